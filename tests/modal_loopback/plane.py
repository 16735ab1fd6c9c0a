"""The control plane: apps, functions, calls, containers, volumes. Each public method answers one call of the wire.

Everything runs in one event loop in a thread of its own, so nothing is locked; `changed` wakes whoever waits.
"""

import asyncio
import hashlib
import inspect
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

from tests.modal_loopback.blobs import Blobs
from tests.modal_loopback.containers import Container

SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
INTERNAL_FAILURE = api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE
ATTEMPTS = 3
"""Containers that may die over one input before it counts as failed."""

POLL = 2.0
"""Seconds that a call which waits for something is held."""


@dataclass
class Function:
    """A function, or a variant of one with other options. `definition` is what the client asked for."""

    id: str
    handle: api_pb2.FunctionHandleMetadata
    definition: api_pb2.Function = field(default_factory=api_pb2.Function)
    base: "Function | None" = None
    serialized_params: bytes = b""
    queue: list["Input"] = field(default_factory=list)


@dataclass
class Input:
    """One call's arguments on their way. task: the container that has it."""

    id: str
    index: int
    call: "Call"
    message: api_pb2.FunctionInput
    task: str | None = None
    attempts: int = 0
    done: bool = False


@dataclass
class Call:
    """A call or a map: inputs go in, outputs come out; web requests stream data both ways."""

    id: str
    function: Function
    invocation: int = 0
    inputs: dict[str, Input] = field(default_factory=dict)
    outputs: list[api_pb2.FunctionGetOutputsItem] = field(default_factory=list)
    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)


@dataclass
class App:
    id: str
    name: str = ""
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    logs: list[api_pb2.TaskLogsBatch] = field(default_factory=list)


@dataclass
class Task:
    """A container that runs or ran. inputs: what it was given, in order."""

    id: str
    function: Function
    app: App
    process: subprocess.Popen
    inputs: list[str] = field(default_factory=list)
    pipes: int = 2
    stopping: bool = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class ControlPlane:
    """Use it as a context manager; `url` is where it listens. folder: where containers and volumes are kept.

    containers: how many of one function run at once unless it asks for fewer. secrets: deployed ones, by name.
    uploads: sha256 -> content of what is kept of earlier uploads, as Modal does; it grows.
    """

    def __init__(
        self,
        folder: Path,
        containers: int = 3,
        secrets: dict[str, dict[str, str]] | None = None,
        uploads: dict[str, bytes] | None = None,
    ):
        self.folder = folder
        self.volumes_folder = folder / "volumes"
        self.containers = containers
        self.apps: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.calls: dict[str, Call] = {}
        self.tasks: dict[str, Task] = {}
        self.images: dict[str, api_pb2.Image] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.uploads = {} if uploads is None else uploads
        self.volumes: dict[str, str] = {}
        self.commits: list[str] = []
        self.sent: list[str] = []
        self.secrets: dict[str, dict[str, str]] = {}
        self.deployed_secrets = secrets or {}
        self.unknown: set[str] = set()
        self._numbers = itertools.count(1)

    # ---- its life

    def __enter__(self) -> "ControlPlane":
        self.volumes_folder.mkdir(parents=True)
        self.blobs = Blobs(self.volumes_folder)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._await(self._open())
        return self

    async def _open(self) -> None:
        self._server = Server([_servicer(self)])
        await self._server.start("127.0.0.1", 0)
        port = self._server._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.changed = asyncio.Condition()

    def __exit__(self, *error: object) -> None:
        for task in self.tasks.values():
            with suppress(ProcessLookupError):
                task.process.kill()
            task.process.wait()
        self._await(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.blobs.close()

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _await(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    # ---- what tests ask

    def volume(self, name: str) -> Path:
        """The folder that is the volume of this name; made if need be."""
        folder = self.volumes_folder / self._volume_id(name)
        folder.mkdir(exist_ok=True)
        self.volumes[name] = folder.name
        return folder

    def function(self, name: str) -> Function:
        """The latest function of this name that is not a variant."""
        return [f for f in self.functions.values() if f.definition.function_name == name and f.base is None][-1]

    def variants(self, name: str) -> list[Function]:
        return [f for f in self.functions.values() if f.base and f.definition.function_name == name]

    def uploaded(self, function: Function) -> dict[str, tuple[bytes, int]]:
        """Path in the container -> content and permission bits, of all that is mounted into the function."""
        found = {}
        for mount_id in function.definition.mount_ids:
            for file in self.mounts[mount_id]:
                found[file.filename] = (self._content(file.sha256_hex), file.mode)
        return found

    def image_commands(self, function: Function) -> list[str]:
        """The Dockerfile of the function's image, from the base up."""
        return self._commands(function.definition.image_id)

    def kill(self, task: Task) -> None:
        """The container ends as when its machine is lost."""
        task.process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """Stop all apps, as Modal does when it has not heard of a client for a while."""
        for app in self.apps.values():
            self._await(self.AppClientDisconnect(api_pb2.AppClientDisconnectRequest(app_id=app.id), None))

    def http(self, function: Function, method: str, path: str, headers: dict[str, str], body: bytes = b""):
        """A web request to a function with an ASGI app -> (status, headers, body), the way that Modal's proxy asks."""
        return self._await(self._http(function, method, path, headers, body))

    # ---- the client: apps

    async def ClientHello(self, request, task):
        return api_pb2.ClientHelloResponse()

    async def EnvironmentGetOrCreate(self, request, task):
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id="en-1", metadata=api_pb2.EnvironmentMetadata(name="main", settings=settings)
        )

    async def AppCreate(self, request, task):
        app = App(self._new("ap"), request.description)
        self.apps[app.id] = app
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url="http://127.0.0.1/app")

    async def AppGetByDeploymentName(self, request, task):
        return api_pb2.AppGetByDeploymentNameResponse()

    async def AppHeartbeat(self, request, task):
        return Empty()

    async def AppPublish(self, request, task):
        app = self.apps[request.app_id]
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
        return api_pb2.AppPublishResponse(url="http://127.0.0.1/deployed", deployed_at=time.time())

    async def AppClientDisconnect(self, request, task):
        app = self.apps[request.app_id]
        app.stopped = True
        for running in self._running(app):
            running.process.terminate()
        await self._tell()
        return Empty()

    async def AppGetLogs(self, request, task):
        app = self.apps[request.app_id]
        seen = int(request.last_entry_id or 0)
        while True:
            for number, batch in enumerate(app.logs[seen:], start=seen + 1):
                batch.entry_id = str(number)
                yield batch
                seen = number
            if app.stopped and not any(t.alive or t.pipes for t in self.tasks.values() if t.app is app):
                yield api_pb2.TaskLogsBatch(app_done=True)
                return
            await self._wait(lambda seen=seen: len(app.logs) > seen, POLL if not app.stopped else 0.1)

    # ---- the client: what a function is made of

    async def ImageGetOrCreate(self, request, task):
        image_id = "im-" + hashlib.sha256(request.image.SerializeToString(deterministic=True)).hexdigest()[:12]
        self.images[image_id] = request.image
        metadata = api_pb2.ImageMetadata(image_builder_version="2025.06")
        result = api_pb2.GenericResult(status=SUCCESS)
        return api_pb2.ImageGetOrCreateResponse(image_id=image_id, result=result, metadata=metadata)

    async def MountGetOrCreate(self, request, task):
        mount_id = self._new("mo")
        self.mounts[mount_id] = list(request.files)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=api_pb2.MountHandleMetadata())

    async def MountBatchedCheckExistence(self, request, task):
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self.uploads]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request, task):
        if not (request.data or request.data_blob_id):  # asks whether it is here; Volumes ask that one by one
            return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.uploads)
        data = self.blobs.contents[request.data_blob_id] if request.data_blob_id else request.data
        assert hashlib.sha256(data).hexdigest() == request.sha256_hex
        self.uploads[request.sha256_hex] = data
        return api_pb2.MountPutFileResponse(exists=True)

    async def BlobCreate(self, request, task):
        blob_id = self._new("bl")
        urls = api_pb2.UploadUrlList(items=[f"{self.blobs.url}/blobs/{blob_id}"])
        return api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    async def BlobGet(self, request, task):
        return api_pb2.BlobGetResponse(download_url=f"{self.blobs.url}/blobs/{request.blob_id}")

    async def SecretGetOrCreate(self, request, task):
        if name := request.deployment_name:
            values = self.deployed_secrets.get(name)
            if values is None or set(request.required_keys) - set(values):
                raise GRPCError(Status.NOT_FOUND, f"Secret {name!r} not found")
        else:
            values = dict(request.env_dict)
        secret_id = self._new("st")
        self.secrets[secret_id] = values
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id)

    async def FunctionPrecreate(self, request, task):
        function_id = request.existing_function_id or self._new("fu")
        handle = api_pb2.FunctionHandleMetadata(
            function_name=request.function_name,
            function_type=request.function_type,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        for name, method in request.method_definitions.items():
            handle.method_handle_metadata[name].CopyFrom(_method_handle(name, method))
        self.functions[function_id] = Function(function_id, handle)
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=handle)

    async def FunctionCreate(self, request, task):
        function = self.functions[request.existing_function_id]
        function.definition = request.function
        ranked = api_pb2.FunctionData.RankedFunction(rank=0, function=request.function)
        data = api_pb2.FunctionData(
            module_name=request.function.module_name,
            function_name=request.function.function_name,
            ranked_functions=[ranked],
        )
        return api_pb2.FunctionCreateResponse(
            function_id=function.id, function=request.function, handle_metadata=function.handle, function_data=data
        )

    async def ClassCreate(self, request, task):
        return api_pb2.ClassCreateResponse(class_id=self._new("cs"), handle_metadata=api_pb2.ClassHandleMetadata())

    async def FunctionBindParams(self, request, task):
        """A variant with other options. A definition lacks what options do not name, so only those are merged."""
        base, options = self.functions[request.function_id], request.function_options
        definition = api_pb2.Function()
        definition.CopyFrom(base.definition)
        definition.resources.MergeFrom(options.resources)
        if options.HasField("concurrency_limit"):
            definition.concurrency_limit = options.concurrency_limit
        if options.replace_secret_ids:
            definition.secret_ids[:] = options.secret_ids
        variant = Function(self._new("fu"), base.handle, definition, base, request.serialized_params)
        self.functions[variant.id] = variant
        return api_pb2.FunctionBindParamsResponse(bound_function_id=variant.id, handle_metadata=base.handle)

    # ---- the client: volumes

    async def VolumeGetOrCreate(self, request, task):
        name = request.deployment_name
        if name not in self.volumes:
            if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise GRPCError(Status.NOT_FOUND, f"Volume {name!r} not found")
            self.volume(name)
        metadata = api_pb2.VolumeMetadata(name=name, version=api_pb2.VOLUME_FS_VERSION_V1)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=self.volumes[name], metadata=metadata)

    async def VolumeListFiles(self, request, task):
        folder = self.volumes_folder / request.volume_id
        entries = []
        for path in sorted(folder.rglob("*") if request.recursive else folder.iterdir()):
            kind = api_pb2.FileEntry.DIRECTORY if path.is_dir() else api_pb2.FileEntry.FILE
            stat = path.stat()
            name = str(path.relative_to(folder))
            entries.append(api_pb2.FileEntry(path=name, type=kind, mtime=int(stat.st_mtime), size=stat.st_size))
        yield api_pb2.VolumeListFilesResponse(entries=entries)

    async def VolumeGetFile2(self, request, task):
        path = self.volumes_folder / request.volume_id / request.path.lstrip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"no file {request.path}")
        size = path.stat().st_size
        url = self.blobs.volume_file(request.volume_id, request.path)
        return api_pb2.VolumeGetFile2Response(get_urls=[url], size=size, start=0, len=size)

    async def VolumeRemoveFile(self, request, task):
        path = self.volumes_folder / request.volume_id / request.path.lstrip("/")
        if not path.exists():
            raise GRPCError(Status.NOT_FOUND, f"no file {request.path}")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return Empty()

    async def VolumePutFiles(self, request, task):
        for file in request.files:
            path = self.volumes_folder / request.volume_id / file.filename.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._content(file.sha256_hex))
            self.sent.append(file.filename.lstrip("/"))
        return Empty()

    async def VolumeCommit(self, request, task):
        self.commits.append(request.volume_id)
        return api_pb2.VolumeCommitResponse(skip_reload=False)

    async def VolumeReload(self, request, task):
        return Empty()

    # ---- the client: calls

    async def FunctionMap(self, request, task):
        call = self._call(self.functions[request.function_id], request.function_call_invocation_type)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id,
            pipelined_inputs=[await self._put(call, item) for item in request.pipelined_inputs],
            function_call_jwt=call.id,
            retry_policy=call.function.definition.retry_policy,
            max_inputs_outstanding=1000,
        )

    async def FunctionPutInputs(self, request, task):
        call = self.calls[request.function_call_id]
        return api_pb2.FunctionPutInputsResponse(inputs=[await self._put(call, item) for item in request.inputs])

    async def FunctionGetOutputs(self, request, task):
        call = self.calls[request.function_call_id]
        seen = int(request.last_entry_id.partition("-")[0] or 0)
        await self._wait(lambda: len(call.outputs) > seen, min(request.timeout, POLL))
        return api_pb2.FunctionGetOutputsResponse(
            outputs=[] if request.clear_on_success and not request.timeout else call.outputs[seen:],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=sum(not item.done for item in call.inputs.values()),
        )

    # ---- the container

    async def ContainerHello(self, request, task):
        return Empty()

    async def ContainerHeartbeat(self, request, task):
        return api_pb2.ContainerHeartbeatResponse()

    async def ContainerStop(self, request, task):
        self.tasks[request.task_id].stopping = True
        await self._tell()
        return api_pb2.ContainerStopResponse()

    async def FunctionGetInputs(self, request, task):
        running = self.tasks[task]
        function = running.function
        await self._wait(lambda: function.queue or running.stopping or running.app.stopped, POLL)
        if running.stopping or running.app.stopped:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        if not function.queue:
            return api_pb2.FunctionGetInputsResponse()
        given = function.queue.pop(0)
        given.task, given.attempts = running.id, given.attempts + 1
        running.inputs.append(given.id)
        item = api_pb2.FunctionGetInputsItem(
            input_id=given.id,
            input=given.message,
            function_call_id=given.call.id,
            function_call_invocation_type=given.call.invocation,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request, task):
        for output in request.outputs:
            self._finish(self._input(output.input_id), output.result, output.data_format)
        await self._tell()
        return Empty()

    async def FunctionCallGetDataIn(self, request, task):
        call = self.calls[request.function_call_id]
        for chunk in call.data_in[request.last_index :]:
            yield chunk
        await self._wait(lambda: call.outputs, 60)  # a stream that ends is asked for again at once

    async def FunctionCallPutDataOut(self, request, task):
        self.calls[request.function_call_id].data_out.extend(request.data_chunks)
        return Empty()

    async def TaskResult(self, request, task):
        """A container that cannot start: its function's calls fail."""
        self._fail_all(self.tasks[task].function, request.result)
        await self._tell()
        return Empty()

    # ---- inside

    def _new(self, prefix: str) -> str:
        return f"{prefix}-{next(self._numbers)}"

    @staticmethod
    def _volume_id(name: str) -> str:
        return f"vo-{name}"

    def _content(self, digest: str) -> bytes:
        return self.uploads[digest]

    def _commands(self, image_id: str) -> list[str]:
        image = self.images[image_id]
        below = [command for base in image.base_images for command in self._commands(base.image_id)]
        return below + list(image.dockerfile_commands)

    def _running(self, app: App) -> list[Task]:
        return [task for task in self.tasks.values() if task.app is app and task.alive]

    def _call(self, function: Function, invocation: int = 0) -> Call:
        call = Call(self._new("fc"), function, invocation)
        self.calls[call.id] = call
        return call

    def _input(self, input_id: str) -> Input:
        return next(call.inputs[input_id] for call in self.calls.values() if input_id in call.inputs)

    async def _put(self, call: Call, item: api_pb2.FunctionPutInputsItem) -> api_pb2.FunctionPutInputsResponseItem:
        put = Input(self._new("in"), item.idx, call, item.input)
        call.inputs[put.id] = put
        call.function.queue.append(put)
        self._scale(call.function)
        await self._tell()
        return api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=put.id, input_jwt=put.id)

    def _finish(self, done: Input, result: api_pb2.GenericResult, data_format: int) -> None:
        if done.done:
            return
        done.done = True
        done.call.outputs.append(
            api_pb2.FunctionGetOutputsItem(
                result=result, idx=done.index, input_id=done.id, data_format=data_format, task_id=done.task or ""
            )
        )

    def _fail_all(self, function: Function, result: api_pb2.GenericResult) -> None:
        while function.queue:
            self._finish(function.queue.pop(0), result, api_pb2.DATA_FORMAT_UNSPECIFIED)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _wait(self, condition: Callable[[], object], seconds: float) -> None:
        async def until() -> None:
            async with self.changed:
                await self.changed.wait_for(condition)

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until(), seconds)

    # ---- containers

    def _scale(self, function: Function) -> None:
        """A container for each input that waits, up to the limit."""
        most = min(function.definition.concurrency_limit or self.containers, self.containers)
        running = [task for task in self.tasks.values() if task.function is function and task.alive]
        busy = sum(not self._input(i).done for task in running for i in task.inputs)
        for _ in range(min(most, busy + len(function.queue)) - len(running)):
            self._start(function)

    def _start(self, function: Function) -> None:
        app = next(app for app in self.apps.values() if (function.base or function).id in app.function_ids.values())
        task_id = self._new("ta")
        definition = function.definition
        volumes = {m.mount_path: (self.volumes_folder / m.volume_id, m.read_only) for m in definition.volume_mounts}
        container = Container(
            task_id,
            self.folder / task_id,
            self._arguments(task_id, function, app),
            self.url,
            self.uploaded(function),
            self._image_environment(definition.image_id) | self._secret_environment(definition.secret_ids),
            volumes,
        )
        self.tasks[task_id] = Task(task_id, function, app, container.start())
        threading.Thread(target=self._watch, args=(self.tasks[task_id],), daemon=True).start()

    def _arguments(self, task_id: str, function: Function, app: App) -> api_pb2.ContainerArguments:
        layout = api_pb2.AppLayout(function_ids=app.function_ids, class_ids=app.class_ids)
        for function_id in app.function_ids.values():
            handle = self.functions[function_id].handle
            layout.objects.append(api_pb2.Object(object_id=function_id, function_handle_metadata=handle))
        for class_id in app.class_ids.values():
            handle = api_pb2.ClassHandleMetadata()
            layout.objects.append(api_pb2.Object(object_id=class_id, class_handle_metadata=handle))
        for object_id in sorted({d.object_id for d in function.definition.object_dependencies}):
            metadata = api_pb2.VolumeMetadata(version=api_pb2.VOLUME_FS_VERSION_V1)
            is_volume = object_id in self.volumes.values()
            layout.objects.append(api_pb2.Object(object_id=object_id, volume_metadata=metadata if is_volume else None))
        return api_pb2.ContainerArguments(
            task_id=task_id,
            function_id=function.id,
            app_id=app.id,
            function_def=function.definition,
            app_layout=layout,
            serialized_params=function.serialized_params,
            environment_name="main",
        )

    def _image_environment(self, image_id: str) -> dict[str, str]:
        lines = [command[4:] for command in self._commands(image_id) if command.startswith("ENV ")]
        return dict(word.partition("=")[::2] for line in lines for word in shlex.split(line) if "=" in word)

    def _secret_environment(self, secret_ids: list[str]) -> dict[str, str]:
        return {name: value for secret in secret_ids for name, value in self.secrets[secret].items()}

    def _watch(self, task: Task) -> None:
        """In a thread: carry what the container prints, then note its end."""
        pipes = ((task.process.stdout, 1), (task.process.stderr, 2))
        readers = [threading.Thread(target=self._carry, args=(task, *pipe), daemon=True) for pipe in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        task.process.wait()
        if not self.loop.is_closed():  # the plane is still there
            asyncio.run_coroutine_threadsafe(self._ended(task), self.loop)

    def _carry(self, task: Task, pipe, descriptor: int) -> None:
        while data := os.read(pipe.fileno(), 2**16):
            log = api_pb2.TaskLogs(data=data.decode(errors="replace"), file_descriptor=descriptor)
            batch = api_pb2.TaskLogsBatch(task_id=task.id, function_id=task.function.id, items=[log])
            with suppress(RuntimeError):
                asyncio.run_coroutine_threadsafe(self._log(task.app, batch), self.loop)

    async def _log(self, app: App, batch: api_pb2.TaskLogsBatch) -> None:
        app.logs.append(batch)
        await self._tell()

    async def _ended(self, task: Task) -> None:
        """What a container that is gone had not done goes to another one."""
        task.pipes = 0
        for input_id in task.inputs:
            lost = self._input(input_id)
            if lost.done or lost.task != task.id:
                continue
            if lost.attempts >= ATTEMPTS:
                failed = api_pb2.GenericResult(status=INTERNAL_FAILURE, exception="the container is lost")
                self._finish(lost, failed, api_pb2.DATA_FORMAT_UNSPECIFIED)
            else:
                task.function.queue.insert(0, lost)
        crashed = [t for t in self.tasks.values() if t.function is task.function and not t.alive and not t.inputs]
        if len(crashed) >= ATTEMPTS:
            failed = api_pb2.GenericResult(status=INTERNAL_FAILURE, exception="the container does not start")
            self._fail_all(task.function, failed)
        if not task.app.stopped and task.function.queue:
            self._scale(task.function)
        await self._tell()

    # ---- web requests

    async def _http(self, function: Function, method: str, path: str, headers: dict[str, str], body: bytes):
        from modal._serialization import deserialize_data_format, serialize_data_format

        route, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": route,
            "raw_path": route.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        call = self._call(function)
        request = {"type": "http.request", "body": body, "more_body": False}
        data = serialize_data_format(request, api_pb2.DATA_FORMAT_ASGI)
        call.data_in.append(api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, data=data, index=1))
        message = api_pb2.FunctionInput(
            args=serialize_data_format(((scope,), {}), api_pb2.DATA_FORMAT_PICKLE),
            data_format=api_pb2.DATA_FORMAT_PICKLE,
            method_name=next(iter(function.definition.method_definitions), ""),
        )
        await self._put(call, api_pb2.FunctionPutInputsItem(input=message))
        await self._wait(lambda: call.outputs, 50)
        chunks = sorted(call.data_out, key=lambda chunk: chunk.index)
        messages = [deserialize_data_format(chunk.data, chunk.data_format, None) for chunk in chunks]
        start = next(message for message in messages if message["type"] == "http.response.start")
        found = {name.decode(): value.decode() for name, value in start.get("headers", [])}
        return start["status"], found, b"".join(message.get("body", b"") for message in messages)


def _method_handle(name: str, method: api_pb2.MethodDefinition) -> api_pb2.FunctionHandleMetadata:
    return api_pb2.FunctionHandleMetadata(
        function_name=method.function_name,
        function_type=method.function_type,
        is_method=True,
        use_method_name=name,
        web_url="http://127.0.0.1/web" if method.webhook_config.type else "",
        supported_input_formats=method.supported_input_formats,
        supported_output_formats=method.supported_output_formats,
    )


def _servicer(plane: ControlPlane) -> ModalClientBase:
    """The gRPC side: each call of the wire goes to the method of its name; others are noted and refused."""

    def handler(name: str):
        async def handle(self, stream) -> None:
            request = await stream.recv_message()
            method = getattr(plane, name, None)
            if method is None:
                plane.unknown.add(name)
                raise GRPCError(Status.UNIMPLEMENTED, f"the loopback knows no {name}")
            answer = method(request, stream.metadata.get("x-loopback-task"))
            if inspect.isasyncgen(answer):
                await _send_all(stream, answer)
            else:
                await stream.send_message(await answer)

        return handle

    names = [name for name in ModalClientBase.__abstractmethods__ if re.match("[A-Z]", name)]
    return type("Servicer", (ModalClientBase,), {name: handler(name) for name in names})()


async def _send_all(stream, answers: AsyncIterator) -> None:
    async for answer in answers:
        await stream.send_message(answer)
