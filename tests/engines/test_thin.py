"""A thin image behaves as the image it was made from: each scenario is run with the original on plain runc and with the
thin image on clip, and what people see of both is compared.

What an overlay shows of directories depends on how many layers have them: their times, sizes and link counts are left
out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.engines import Docker
from tests.support.host import Host, wait_for

LOOK = """look() {
    find "$@" -type d -exec stat -c '%n %A %u:%g' {} + | sort
    find "$@" ! -type d -exec stat -c '%N %A %u:%g %h %s %Y' {} + | sed 's/ 1[7-9][0-9]*$/ new/' | sort
}
"""
Seen = dict[str, object]


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    with Host("shared") as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


@pytest.fixture(scope="module")
def docker(host: Host) -> Iterator[Docker]:
    """Build steps run on the default runtime; `docker run` names its own."""
    with Docker(host, options=["--default-runtime=clip"]) as engine:
        yield engine
        assert host.clip_overlays() == []


@pytest.fixture(scope="module")
def both(docker: Docker, pushed: Callable[[str], str], thin: Callable[[str], str]) -> tuple[Side, Side]:
    return Side(docker, "plain", docker.pull(pushed("app"))), Side(docker, "clip", docker.pull(thin("app")))


class Side:
    """One of the two: an image and the runtime it is run with."""

    def __init__(self, docker: Docker, runtime: str, image: str) -> None:
        self.docker = docker
        self.runtime = runtime
        self.image = image
        self.place = docker.base / f"files-{runtime}"
        self.place.mkdir()
        (self.place / "dir").mkdir()
        (self.place / "dir/inner").write_text("inner")
        (self.place / "file").write_text("from the host")
        (self.place / "file").chmod(0o640)

    def call(self, *arguments: str | Path) -> tuple[int, str, str]:
        """(exit code, stdout, stderr), own names replaced."""
        done = self.docker.call(*arguments, check=False)
        return done.returncode, self.neutral(done.stdout), self.neutral(done.stderr)

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        return self.call("run", "--network=none", f"--runtime={self.runtime}", *arguments)

    def neutral(self, text: str) -> str:
        for word, instead in ((self.image, "IMAGE"), (str(self.place), "PLACE"), (self.runtime, "SIDE")):
            text = text.replace(word, instead)
        return text


def same(both: tuple[Side, Side], watch: Callable[[Side], Seen]) -> Seen:
    """Both sides' scenario, at the same time; compared step by step."""
    with ThreadPoolExecutor(2) as pool:
        original, thin = pool.map(watch, both)
    assert list(original) == list(thin)
    for step, seen in original.items():
        assert thin[step] == seen, f"{step}\n{seen}\n{thin[step]}"
    return original


def test_runs(both: tuple[Side, Side]) -> None:
    """Entrypoint, user by name, working directory made by the engine, environment, volumes' content, setuid."""

    def watch(side: Side) -> Seen:
        look = LOOK + "look /var/lib/app /srv/link/ /srv/app /run /usr/lib/deep /usr/share; "
        volume = f"{side.runtime}-state:/var/lib/app"
        binds = ["-v", f"{side.place}/file:/usr/share/page", "-v", f"{side.place}/dir:/lib/deep/er:ro"]
        more = "env | grep -v HOSTNAME | sort; /usr/local/bin/su root -c id; sha256sum /var/lib/app/current"
        return {
            "as it is": side.run("--rm", side.image, "sh", "-c", look + more),
            "binds, a directory of the tree, read-only": side.run(
                *("--rm", "-w", "/lib/deep", "--read-only", *binds, "-u", "root:extra", side.image, "sh", "-c"),
                look + "pwd; id; cat /usr/share/page; touch /srv/x",
            ),
            "new directory behind a link, named volume, tmpfs": side.run(
                *("--rm", "-w", "/srv/app/run/w", "-v", volume, "--tmpfs=/usr/share", "-u", "1000", side.image, "sh"),
                *("-c", look + "pwd; id"),
            ),
            "no such user": side.run("--rm", "-u", "nobody", side.image, "id"),
            "no such program": side.run("--rm", "--entrypoint=/srv/none", side.image)[:2],
            "work in a file": side.run("--rm", "-w", "/etc/passwd", side.image, "id"),
        }

    seen = same(both, watch)
    code, out, _ = seen["as it is"]  # type: ignore[misc]
    assert code == 0
    assert "entry: user in /srv/app/work, 3 words, MODE=image" in out
    assert "\nuid=0 gid=0(root)" in out
    assert "/var/lib/app/db -rw------- 1000:1000 2 200000 1600000000" in out


def test_lives(both: tuple[Side, Side]) -> None:
    """exec, health check, cp both ways, restart, commit; the same container stopped and started."""
    places = ("/tmp/in", "/usr/share/page", "/lib/deep/in", "/srv/page", "/bin/", "/none/x", "/var/lib/app/in")
    sources = ("/usr/share/page", "/usr/lib/deep", "/bin", "/srv/link", "/var/lib/app", "/srv/app/entry", "/none")

    def fetched(side: Side, source: str) -> list[str]:
        target = side.place / f"out-{source.replace('/', '-')}"
        if side.call("cp", f"box-{side.runtime}:{source}", target)[0]:
            return ["not there"]
        paths = sorted([target, *target.rglob("*")])
        lines = [f"{path} {path.lstat().st_mode:o} {path.lstat().st_uid}:{path.lstat().st_gid}" for path in paths]
        return [side.neutral(line) for line in lines] + [
            path.read_text("latin-1") for path in paths if path.is_file() and not path.is_symlink()
        ]

    def watch(side: Side) -> Seen:
        box = f"box-{side.runtime}"

        def health() -> str:
            return str(side.docker.inspect(box)["State"]["Health"]["Status"])

        def shell(script: str) -> tuple[int, str, str]:
            return side.call("exec", "-u", "root", box, "sh", "-c", LOOK + script)

        seen: Seen = {"started": side.run("-d", "--name", box, side.image, "sleep", "1000")[0]}
        seen["exec"] = (
            shell("id; pwd"),
            side.call("exec", "-u", "user", "-w", "/usr/lib/deep", box, "sh", "-c", "id; pwd"),
        )
        wait_for("the container is healthy", lambda: health() == "healthy")
        seen["cp in"] = [side.call("cp", side.place / "file", f"{box}:{place}") for place in places]
        seen["cp a directory in"] = [
            side.call("cp", side.place / "dir", f"{box}:/usr/lib/deep{n}") for n in ("", "/er")
        ]
        seen["after cp"] = shell(
            "look /tmp /usr/lib /usr/share /bin/file /var/lib/app; cat /srv/page /srv/link/state/seed"
        )
        seen["cp out"] = {source: fetched(side, source) for source in sources}
        seen["changed"] = shell(  # removed, made anew
            "cd /usr/lib/deep; echo kept >kept; rm -r er /usr/share/page /srv/app/healthy; mkdir er"
        )
        wait_for("the container is unhealthy", lambda: health() == "unhealthy")
        seen["restarted"] = (
            side.call("restart", "-t", "0", box)[0],
            shell("look /usr/lib/deep /usr/share; ls /var/lib/app"),
        )
        seen["committed"] = side.call("commit", box, f"made-{side.runtime}")[0]
        seen["stopped"] = side.call("stop", box)[0]
        seen["cp in, stopped"] = [
            side.call("cp", side.place / "file", f"{box}:{p}") for p in ("/usr/lib/deep/x", "/bin/env")
        ]
        seen["started again"] = side.call("start", box)[0], shell("look /usr/lib/deep /usr/bin/env /usr/share")
        seen["removed"] = side.call("rm", "-f", "-v", box)[0]
        seen["made"] = side.run(
            "--rm",
            f"made-{side.runtime}",
            "sh",
            "-c",
            LOOK + "look /usr/lib/deep /usr/share /srv/app; cat /usr/lib/deep/kept",
        )
        return seen

    seen = same(both, watch)
    assert seen["made"][0] == 0  # type: ignore[index]


def test_restart_policy(both: tuple[Side, Side]) -> None:
    def watch(side: Side) -> Seen:
        box = f"again-{side.runtime}"
        command = "cat /usr/lib/deep/er/file; echo x >>/srv/app/starts; exit 3"
        side.run("-d", "--name", box, "--restart=on-failure:2", side.image, "sh", "-c", command)

        def ended() -> bool:
            found = side.docker.inspect(box)
            return found["RestartCount"] == 2 and found["State"]["Status"] == "exited"

        wait_for("the last restart has ended", ended)
        state = side.docker.inspect(box)["State"]["ExitCode"]
        seen: Seen = {"exit code": state, "logs": side.call("logs", box)}
        seen["starts"] = side.call("cp", f"{box}:/srv/app/starts", side.place)[0], (side.place / "starts").read_text()
        seen["removed"] = side.call("rm", "-v", box)[0]
        return seen

    assert same(both, watch)["starts"] == (0, "x\nx\nx\n")


DOCKERFILE = """FROM {base}
COPY file /tmp/file
COPY file /bin/file
COPY file /srv/page
COPY --chown=user dir /usr/lib/deep/er/
COPY dir /opt/new
ADD file /srv/app/run/f
COPY file /srv/app/work/
WORKDIR sub/dir
ENV MODE=built
USER root
RUN cp /usr/lib/deep/er/file /opt/copied && rm -r /usr/lib/deep && mkdir /usr/lib/deep && id -u >/opt/who
"""
AGAIN = """FROM {base}
COPY file /opt/new/again
WORKDIR /usr/lib/deep/er/x
USER user
"""


def test_builds(both: tuple[Side, Side]) -> None:
    """COPY, WORKDIR and RUN on it, and an image built on that one; saved and loaded."""

    def build(side: Side, dockerfile: str, base: str, tag: str) -> tuple[int, str]:
        (side.place / "Dockerfile").write_text(dockerfile.format(base=base))
        (side.place / ".dockerignore").write_text("out-*\nsaved.tar\n")
        classic = {"DOCKER_BUILDKIT": "0"}
        done = side.docker.call("build", "-q", "--network=none", "-t", tag, side.place, check=False, env=classic)
        return done.returncode, "" if done.returncode == 0 else done.stderr

    def watch(side: Side) -> Seen:
        one, two = f"one-{side.runtime}", f"two-{side.runtime}"
        look = LOOK + "look /tmp /bin/file /bin /srv /run /opt /usr/lib;"
        seen: Seen = {"built": build(side, DOCKERFILE, side.image, one)}
        seen["built on that"] = build(side, AGAIN, one, two)
        seen["saved"] = side.call("save", "-o", side.place / "saved.tar", two)
        seen["untagged"] = side.call("rmi", two, one)[0]
        seen["loaded"] = side.call("load", "-i", side.place / "saved.tar")[0]
        seen["run"] = side.run("--rm", two, "sh", "-c", look + "pwd; cat /opt/* /srv/page /usr/share/page")
        seen["gone"] = side.call("rmi", two)[0]
        return seen

    seen = same(both, watch)
    assert seen["built"] == seen["built on that"] == (0, "")
    _, out, _ = seen["run"]  # type: ignore[misc]
    assert "entry: user in /usr/lib/deep/er/x, 3 words, MODE=built" in out
    assert "/tmp drwxrwxrwt 0:0" in out


def test_history_names_the_original(both: tuple[Side, Side], docker: Docker) -> None:
    lines = docker.output("history", "--no-trunc", "--format", "{{.CreatedBy}}", both[1].image).splitlines()
    assert lines[0].startswith(f"clip-shim convert {both[0].image}@sha256:")
    assert lines[1:] == docker.output("history", "--format", "{{.CreatedBy}}", both[0].image).splitlines()
    configs = [json.loads(docker.output("image", "inspect", side.image))[0]["Config"] for side in both]
    assert configs[0] == configs[1]


def test_containerd(docker: Docker, both: tuple[Side, Side]) -> None:
    """`ctr run`: user by name, working directory, entrypoint, binds over the tree, read-only; exec."""
    containerd = docker.containerd

    def watch(side: Side) -> Seen:
        containerd.pull(side.image)
        runtime = containerd.clip if side.runtime == "clip" else containerd.plain

        def run(name: str, *arguments: str) -> tuple[int, str, str]:
            done = containerd.run(*arguments, runtime=runtime, check=False)
            containerd.call("containers", "delete", f"{name}-{side.runtime}", check=False)
            return done.returncode, side.neutral(done.stdout), side.neutral(done.stderr)

        look = LOOK + "look /var/lib/app /srv /usr/lib/deep /usr/share; pwd; id; /usr/local/bin/su root -c id"
        bind = f"type=bind,src={side.place}/file,dst=/usr/share/page,options=rbind:ro"
        return {
            "as it is": run("c1", "--rm", side.image, f"c1-{side.runtime}"),
            "command": run("c2", "--rm", side.image, f"c2-{side.runtime}", "sh", "-c", look),
            "options": run(
                *("c3", "--rm", "--user", "root", "--cwd", "/lib/deep", "--read-only", "--mount", bind, side.image),
                *(f"c3-{side.runtime}", "sh", "-c", look + "; touch /srv/x; cat /usr/share/page"),
            ),
            "no such user": run("c4", "--rm", "--user", "nobody", side.image, f"c4-{side.runtime}", "id")[0],
        }

    seen = same(both, watch)
    assert "entry: user in /srv/app/work, 1 words, MODE=image\nuid=1000(user)" in seen["as it is"][1]  # type: ignore[index]
