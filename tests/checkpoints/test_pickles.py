"""Pickles run nothing."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd import model_loader
from sd.checkpoints.errors import CheckpointError
from sd.checkpoints.layouts import PREFIXES
from tests.checkpoints.common import assert_same, error_of


class Payload:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Payload(os.system, f"touch {marker}"),
        "builtins.eval": Payload(eval, code),
        "builtins.exec": Payload(exec, code),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "builtins.getattr": Payload(getattr, os, "system"),
    }


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen"])
@pytest.mark.parametrize("form", ["zip", "legacy", "raw 0", "raw 2", "raw 4"])
def test_a_payload_is_refused_by_name(tmp_path, tensors, name, form):
    marker = tmp_path / "executed"
    path = tmp_path / "weights.ckpt"
    content = {"state_dict": tensors, "extra": payloads(marker)[name]}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps(content["extra"], protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert f"refuses to run {name}" in error_of(path)
    assert not marker.exists()
    with pytest.raises(CheckpointError):
        model_loader.read_state_dict(path)
    assert not marker.exists()


def test_the_payloads_would_run(tmp_path):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(payloads(marker)["builtins.eval"]))
    assert marker.exists()


def test_classes_of_lightning_do_nothing(tmp_path, models, tensors, monkeypatch):
    """A class of that name that is there is not touched either."""
    ran = []
    module = type(sys)("pytorch_lightning")
    module.Callback = type(
        "Callback", (), {"__module__": "pytorch_lightning", "__setstate__": lambda *a: ran.append(a)}
    )
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    callback = module.Callback()
    callback.state = 1
    torch.save({"state_dict": tensors, "callback": callback}, tmp_path / "weights.ckpt")
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)
    assert not ran
    torch.load(tmp_path / "weights.ckpt", weights_only=False)
    assert ran


def test_without_the_state_dict_level(tmp_path, models, tensors):
    torch.save(tensors, tmp_path / "weights.ckpt")
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)


@pytest.mark.parametrize(
    ("strange", "problem"),
    [
        (lambda t: t.to(torch.complex64), "refuses to run torch.ComplexFloatStorage"),
        (lambda t: t.to(torch.int64), "torch.int64"),
        (lambda t: t.to_sparse(), "refuses to run torch._utils._rebuild_sparse_tensor"),
        (lambda t: t.to("meta"), "refuses to run torch._utils._rebuild_meta"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "refuses to run"),
    ],
    ids=["complex", "integer", "sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_strange_tensors(tmp_path, tensors, strange, problem):
    name = PREFIXES["unet"] + "out.2.weight"
    torch.save({**tensors, name: strange(tensors[name])}, tmp_path / "weights.ckpt")
    assert problem in error_of(tmp_path / "weights.ckpt")
