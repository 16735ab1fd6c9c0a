"""Modal's control plane on 127.0.0.1, as far as this project needs it, to run modal_*.py with no account.

The real `modal run` and `modal deploy` talk to it, and function bodies run in the real container entry point, one
process a container, on the files that were really uploaded. So what is tested is the client's side in full: what is
uploaded, mounted and asked for, how calls, results, logs and failures travel. What only Modal can show is not: images
are not built, a GPU is only asked for, volumes are plain folders without commits, and nothing validates a request.

    plane.py       apps, functions, calls, containers, volumes; the answers to what the client and containers call
    containers.py  a container: a process in a mount namespace where that is allowed, else in a folder
    blobs.py       the HTTP side: large uploads, volume files
    client.py      `modal ...` as a subprocess that can reach nothing but the loopback

The wire format belongs to modal 1.6.4, which requirements.txt pins.
"""

from tests.modal_loopback.client import Finished, Loopback
from tests.modal_loopback.plane import ControlPlane

__all__ = ["ControlPlane", "Finished", "Loopback"]
