"""What holds for every test: no network, and engines on one worker."""

import os
import signal
import socket

import pytest

# Before any engine is imported. vLLM looks up its own address by asking a name server unless it is told.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: OpenMP threads that spin slow all of them down
    num_threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))

# A job in the background, or under nohup, starts with these ignored, and so would every process that a test starts.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::")


def pytest_collection_modifyitems(items):
    """Put all engine tests into one xdist group, so that no two engines run at once."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.xdist_group("engine"))


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Python sockets reach this machine only, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return

    def guarded(real):
        def call(self, address, *args):
            refuse_remote(address[0] if self.family in (socket.AF_INET, socket.AF_INET6) else "localhost")
            return real(self, address, *args)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect), raising=True)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    real_lookup = socket.getaddrinfo

    def lookup(host, *args, **kwargs):
        refuse_remote(host)
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def refuse_remote(host):
    """Raise unless the host is this machine; None is what a server binding to all interfaces passes."""
    name = host.decode() if isinstance(host, bytes) else host
    if name and name != socket.gethostname() and not name.startswith(LOOPBACK):
        raise RuntimeError(f"a test tried to reach {name}: tests use no network (mark it `network` if it has to)")
