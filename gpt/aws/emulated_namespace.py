"""What stands between `unshare` and the entrypoint of an emulated host: it gives the host its name, its /opt/ml and its processes.

`emulated_namespace.py <host> <folder that is to be /opt/ml> <file that is to be /etc/hosts> <entrypoint...>` runs as process 1 of new user,
mount, process and name spaces (Linux: unshare(1), namespaces(7)), and becomes the entrypoint. `emulated_namespace.py loopback` holds a
network of its own, in which there is nothing but the loopback interface, until its stdin ends.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path


def enter(host: str, root: str, hosts: str, command: list[str]) -> None:
    """Lay out the host, and become the command."""
    socket.sethostname(host)
    _mount("--make-rprivate", "/")
    _mount("-t", "proc", "proc", "/proc")
    _mount("--bind", hosts, "/etc/hosts")
    place = Path("/opt/ml")
    if not place.is_dir():
        _make_room(place.parent, Path(f"{root}.opt"))
        place.mkdir()
    _mount("--bind", root, str(place))
    os.chdir("/")
    os.execvp(command[0], command)


def _make_room(folder: Path, aside: Path) -> None:
    """Put an empty folder in the place of another, with all that is in that."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    aside.mkdir(exist_ok=True)
    _mount("--rbind", str(folder), str(aside))
    _mount("-t", "tmpfs", "tmpfs", str(folder))
    for entry in entries:
        old = aside / entry.name
        if old.is_symlink():
            entry.symlink_to(os.readlink(old))
            continue
        if old.is_dir():
            entry.mkdir()
        else:
            entry.touch()
        _mount("--rbind", str(old), str(entry))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def hold_loopback() -> None:
    """Bring the loopback interface up, say so, and wait."""
    set_flags, is_up = 0x8914, 0x1  # netdevice(7): SIOCSIFFLAGS, IFF_UP
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        fcntl.ioctl(opened, set_flags, struct.pack("16sH", b"lo", is_up))
    print("up", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:] == ["loopback"]:
        hold_loopback()
    else:
        enter(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
