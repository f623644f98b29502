"""What torch does in processes of its own: compile, and meet other processes."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from gpt.commands import DoctorConfig
from gpt.config import DeviceConfig
from gpt.doctor.result import Result, one_line

_COMPILE_SECONDS, _MEET_SECONDS = 60, 25
_MEETING = """
import datetime, sys, torch, torch.distributed as dist
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, datetime.timedelta(seconds=20))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
x = torch.full((1 << 20,), float(rank + 1))
dist.all_reduce(x)
assert bool((x == 3).all()), x
dist.barrier()
dist.destroy_process_group()
"""


def compiler(config: DoctorConfig) -> Result:
    """Whether torch.compile makes a kernel that computes the right thing, on the device a run would take."""
    command = [sys.executable, "-c", "import sys; from gpt.doctor.processes import compile_tiny; compile_tiny(sys.argv[1])", config.device]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False, env=_environment())
    except subprocess.TimeoutExpired:
        fix = "compile=false until it is mended; see whether the compiler hangs: echo 'int x;' | c++ -x c++ -c - -o /dev/null"
        return Result("warning", f"not done after {_COMPILE_SECONDS} s", fix)
    if done.returncode == 0:
        name, _, obstacle = done.stdout.strip().rpartition("\n")[2].partition("\t")
        if obstacle:
            return Result("ok", f"n/a: {obstacle}") if name == "mps" else Result("warning", obstacle, "pip install triton")
        return Result("ok", f"works on {name} ({time.perf_counter() - started:.0f} s)")
    return Result("warning", f"fails, so runs are slower: {_reason(done.stdout + done.stderr)}", _compiler_fix())


def compile_tiny(device: str) -> None:
    """Compile a function that no cache has and run it; prints the device. In a process of its own: its caches and threads go with it."""
    import torch

    from gpt.runtime.compiling import skip_vector_probes
    from gpt.runtime.device import find_device

    there = torch.accelerator.current_accelerator(check_available=True)
    found = find_device(DeviceConfig("auto" if there is not None and device in ("auto", there.type) else "cpu"))
    obstacle = found.compile_obstacle()
    if obstacle and not found.is_host:
        print(f"{found.type}\t{obstacle}")
        return
    skip_vector_probes()
    factor = random.random()  # a constant of the kernel, which therefore is new
    compiled = torch.compile(lambda x: (x * factor).sin() + 1, **found.compile_options())
    x = torch.linspace(0, 1, 1024)
    wrong = (compiled(x.to(found.type)).cpu() - ((x * factor).sin() + 1)).abs().max().item()
    assert wrong < 1e-5, f"the compiled function is wrong by {wrong}"
    print(found.type)


def _compiler_fix() -> str:
    """What to do about it, from what is missing."""
    chosen = os.environ.get("CXX", "g++")
    apt = shutil.which("apt-get") is not None
    if shutil.which(chosen) is None and shutil.which("clang++") is None:
        if "CXX" in os.environ:
            return f"there is no CXX={chosen}: unset CXX, or set it to a C++ compiler"
        if platform.system() == "Darwin":
            return "xcode-select --install"
        return "sudo apt-get install g++" if apt else "install a C++ compiler (g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return f"sudo apt-get install {package}" if apt else "install Python's C headers (python3-devel, or the like)"
    return "see that the compiler itself works (CXX names another one); until then compile=false"


def _reason(output: str) -> str:
    """The line of a long report that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    compilers = [match[1] for line in lines if (match := re.search(r"\berror: (.+)", line))]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    said = (compilers[:1] or errors[-1:] or lines[-1:] or ["it ended without a word"])[0]
    inner = re.sub(r"^[\w.]+: (?=\w+: )", "", said)  # one error within another
    return one_line(re.sub(r"\[enforce fail at \S+\] ", "", inner), 200)


def process_group(config: DoctorConfig) -> Result:
    """Whether two processes of this machine find each other over gloo and add up a tensor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        ranks = [
            subprocess.Popen([sys.executable, "-c", _MEETING, str(rank), str(port)], stdout=said, stderr=said, env=_environment())
            for rank in range(2)
        ]
        try:
            codes = [rank.wait(max(0.1, started + _MEET_SECONDS - time.perf_counter())) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        said.seek(0)
        output = said.read()
    if codes == [0, 0]:
        return Result("ok", f"two processes meet over gloo ({time.perf_counter() - started:.0f} s)")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        fix = f"unset GLOO_SOCKET_IFNAME (it is {interface}), or set it to an interface that ip addr lists"
    else:
        fix = f"let this host's name have an address: echo '127.0.0.1 {socket.gethostname()}' | sudo tee -a /etc/hosts; "
        fix += "or export GLOO_SOCKET_IFNAME=lo"
    why = f"not done after {_MEET_SECONDS} s" if codes is None else _reason(output)
    return Result("problem", f"two processes do not meet over gloo: {why}", fix)


def _environment() -> dict[str, str]:
    """This process's, with its import path, and without what a launcher may have left in it."""
    own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    path = os.pathsep.join(p for p in sys.path if p)
    return {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONPATH": path}
