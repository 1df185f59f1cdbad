"""An image as applications have it: an entrypoint script, a user by name, a volume with content, a health check, a
setuid tool, a working directory that nobody made yet."""

from __future__ import annotations

from tests.support import smallimage
from tests.support.ocitar import DIR, LINK, SYM, Entry

ENTRY = b"""#!/bin/sh
# prints who runs where, then becomes what it is told
echo "entry: $(id -un) in $(pwd), $# words, MODE=$MODE"
exec "$@"
"""
PASSWD = b"root::0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"  # su needs no password
GROUP = b"root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"
STATE = b"var/lib/app"

CONFIG: dict[str, object] = {
    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "MODE=image"],
    "User": "user",
    "WorkingDir": "/srv/app/work",  # an engine makes it
    "Entrypoint": ["/srv/app/entry"],
    "Cmd": ["id"],
    "Volumes": {"/var/lib/app": {}, "/srv/link/state": {}, "/srv/none": {}},
    "Healthcheck": {"Test": ["CMD", "test", "-f", "/srv/app/healthy"], "Interval": 200_000_000, "Retries": 3},
    "Labels": {"purpose": "test"},
    "StopSignal": "SIGKILL",
}


def layer() -> list[Entry]:
    own = {"uid": 1000, "gid": 1000}
    return [
        Entry(b"etc/passwd", data=PASSWD),
        Entry(b"etc/group", data=GROUP),
        Entry(b"etc/shells", data=b"/bin/sh\n"),
        Entry(b"srv", DIR, 0o755),
        Entry(b"srv/app", DIR, 0o2775, **own),  # type: ignore[arg-type]
        Entry(b"srv/app/entry", mode=0o755, data=ENTRY),
        Entry(b"srv/app/healthy", data=b"yes"),
        Entry(b"srv/app/run", SYM, 0o777, target=b"/run/app"),  # leads nowhere yet
        Entry(b"srv/link", SYM, 0o777, target=b"target"),
        Entry(b"srv/page", SYM, 0o777, target=b"../usr/share/page"),  # to a file
        Entry(b"srv/target", DIR, 0o755),
        Entry(b"srv/target/state", DIR, 0o1777),
        Entry(b"srv/target/state/seed", data=b"seed"),
        Entry(STATE, DIR, 0o700, **own),  # type: ignore[arg-type]
        Entry(STATE + b"/db", mode=0o600, data=smallimage.noise(11, 200_000), xattrs={"user.kind": b"db"}, **own),  # type: ignore[arg-type]
        Entry(STATE + b"/db.link", LINK, target=STATE + b"/db", mode=0o600, xattrs={"user.kind": b"db"}, **own),  # type: ignore[arg-type]
        Entry(STATE + b"/current", SYM, 0o777, target=b"db", **own),  # type: ignore[arg-type]
        Entry(b"usr/lib/deep", DIR, 0o755),
        Entry(b"usr/lib/deep/er", DIR, 0o751, uid=5, gid=6),
        Entry(b"usr/lib/deep/er/file", data=b"deep"),
        Entry(b"usr/local/bin/su", mode=0o4755, data=smallimage.busybox()),
        Entry(b"usr/share/page", data=b"page"),
    ]
