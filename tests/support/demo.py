"""`make demo`: an image is indexed, and a container runs from the index alone.

    python -m tests.support.demo [REFERENCE]

Without a reference an image of this machine's own distribution is built and pushed to a registry on this machine. All
that is started or mounted is undone at the end, on Ctrl-C and on failure too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.support import bundle, images
from tests.support.host import CLIP_SHIM, Host
from tests.support.registry import Registry

T = TypeVar("T")
BOLD, DIM, GREEN, PLAIN = ("\033[1m", "\033[2m", "\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "", "", "")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PYTHON = "import platform, json; print('hello from Python', platform.python_version(), 'in a lazily loaded container')"


def say(text: str) -> None:
    print(f"{BOLD}{text}{PLAIN}", flush=True)


def mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def timed(what: str, work: Callable[[], T]) -> T:
    """Run it and print a line with how long it took."""
    begin = time.monotonic()
    result = work()
    print(f"  {what:<58} {GREEN}{time.monotonic() - begin:7.2f} s{PLAIN}", flush=True)
    return result


def command_of(built_here: bool) -> list[str]:
    """What the container runs: something of the image's own that shows that it works."""
    if built_here:
        return ["python3", "-c", _PYTHON]
    return ["sh", "-c", "head -n 2 /etc/os-release; echo /*"]


def fetched(host: Host) -> tuple[int, int]:
    """(bytes fetched, bytes of layers uncompressed) by the daemon's own account."""
    layers = host.status()["layers"]
    return sum(layer["fetched_bytes"] for layer in layers), sum(layer["size"] for layer in layers)


def make_bundle(host: Host, index: Path, name: str, built_here: bool) -> Path:
    made = bundle.make(host.base / name, command_of(built_here), index=index)
    config = json.loads((made / "config.json").read_text())
    config["process"]["env"] = [bundle.PATH, "HOME=/root"]
    (made / "config.json").write_text(json.dumps(config))
    return made


def run_container(host: Host, made: Path) -> str:
    return host.output(*host.oci, "run", "--bundle", made, made.name, timeout=600)


def demo(stack: contextlib.ExitStack, given: str) -> None:
    host = stack.enter_context(Host())
    reference = given
    if not given:
        say("An image, and a registry to serve it")
        image = timed("image of this machine's own distribution (kept)", lambda: images.image("debian"))
        registry = stack.enter_context(Registry())
        host.trust_registry(registry.host)
        reference = timed("pushed to a registry on this machine", lambda: images.push(image, registry.host))
    say(f"\nThe index of {reference}")
    index = timed("clip-shim index: every layer streamed once, nothing stored", lambda: host.index(reference, "demo"))
    facts = json.loads(host.output(CLIP_SHIM, "inspect", index, "--json"))
    print(
        f"  {facts['entries']:,} files and directories, {mb(facts['image_bytes'])} compressed; the index is "
        f"{mb(facts['index_bytes'])} ({100 * facts['index_bytes'] / max(1, facts['image_bytes']):.2f} %)"
    )
    say("\nThe daemon, and containers by runc")
    timed("clip-shim daemon", host.start_daemon)
    output = timed(
        "first container, nothing fetched before",
        lambda: run_container(host, make_bundle(host, index, "demo-1", not given)),
    )
    print("".join(f"    {DIM}{line}{PLAIN}\n" for line in output.splitlines()), end="")
    timed("second container", lambda: run_container(host, make_bundle(host, index, "demo-2", not given)))
    got, whole = fetched(host)
    say("\nWhat it took")
    print(f"  {'size of the image, compressed':<58} {mb(facts['image_bytes']):>12}")
    print(f"  {'size of the image, unpacked':<58} {mb(whole):>12}")
    print(f"  {'fetched for both containers':<58} {GREEN}{mb(got):>12}{PLAIN}", end="")
    print(f"  ({100 * got / max(1, facts['image_bytes']):.0f} % of the image)")


def _interrupt(*_: object) -> None:
    """The first signal ends the demo; the ones after it (make sends another) must not end the cleaning up."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    if os.geteuid() != 0:
        print("demo: needs root, because it mounts: sudo make demo", file=sys.stderr)
        return 1
    for number in ENDING:
        signal.signal(number, _interrupt)
    begin = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            demo(stack, argv[0] if argv else "")
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleaned up", file=sys.stderr)
        return 130
    except AssertionError as error:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a child noticed the interruption before us
            print("\ninterrupted", file=sys.stderr)
            return 130
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print(f"\n{DIM}done in {time.monotonic() - begin:.0f} s; nothing is left mounted or running{PLAIN}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
