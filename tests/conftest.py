"""What holds for every test: no network, and engines on one worker. --without-engines: the tests that need none."""

import os
import re
import signal
import socket
import sys

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


ENGINES = ("torch", "transformers", "vllm", "peft", "datasets", "megatron")
IMPORTS_ENGINE = re.compile(rf"^(?:import|from) (?:{'|'.join(ENGINES)})\b|^from slow_losses ", re.MULTILINE)


def pytest_addoption(parser):
    parser.addoption("--without-engines", action="store_true", help="as where no engine is installed, and without slow tests")


class NoEngines:
    """A finder of modules that finds no engine."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ENGINES:
            raise ModuleNotFoundError(f"No module named {name!r} (--without-engines)", name=name)


def pytest_configure(config):
    if config.getoption("without_engines"):
        sys.meta_path.insert(0, NoEngines())


def pytest_ignore_collect(collection_path, config):
    """True for a module that imports an engine at its top, where engines are made unimportable."""
    if config.getoption("without_engines") and collection_path.suffix == ".py":
        return bool(IMPORTS_ENGINE.search(collection_path.read_text())) or None
    return None


@pytest.hookimpl(tryfirst=True)  # before xdist's, which writes the groups into the names that it deals out
def pytest_collection_modifyitems(config, items):
    """Put all engine tests into one xdist group, so that no two engines run at once."""
    if config.getoption("without_engines"):
        items[:] = [item for item in items if not (item.get_closest_marker("engine") or item.get_closest_marker("slow"))]
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
