"""What plays `gpt.launch` in a wheel that is quick to install and to run: it does what the first of sample_prompts says.

It writes what it was given into `<run directory>/seen-<host>.json`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    host, first = os.environ["SM_CURRENT_HOST"], config["launch"]["node_rank"] == 0
    directory = Path(config["run"]["dir"], config["run"]["id"])
    failure = Path(os.environ["GPT_FAILURE_FILE"])
    act, _, rest = config["train"]["sample_prompts"][0].partition(":")
    if first or act == "both write":
        directory.mkdir(parents=True, exist_ok=True)
        seen = {
            "config": config, "environment": dict(os.environ), "parent": os.getppid(), "host": socket.gethostname(),
            "interfaces": [name for _, name in socket.if_nameindex()], "cores": sorted(os.sched_getaffinity(0)),
        }  # fmt: skip
        (directory / ("seen.json" if act == "both write" else f"seen-{host}.json")).write_text(json.dumps(seen))
        (directory / "config.yaml").write_text(json.dumps(config))
        if first and act == "both write":
            time.sleep(2)  # the job ends with the first host, and the other may be slower to write
    print(f"{act} on {host}", flush=True)
    starts = len(list(directory.glob("start-*"))) + 1
    if first:
        (directory / f"start-{starts}").touch()
    if act == "train":
        for name in ("model", "checkpoints/step-00000001", "adapter"):
            (directory / name).mkdir(parents=True, exist_ok=True)
            (directory / name / "weights").write_text(name)
        (directory / "report.html").write_text("report")
        return 0
    if act == "say":  # what the user is to read
        failure.write_text(rest, encoding="utf-8")
        return 2
    if act == "lose the others":
        failure.touch()
        return 1
    if act == "one fails":  # on the second host; the first one only loses it
        if not first:
            failure.write_text(rest, encoding="utf-8")
            return 2
        failure.touch()
        time.sleep(1)
        return 1
    if act == "one fails alone":
        if not first:
            failure.write_text(rest, encoding="utf-8")
            return 1
        time.sleep(60)
    if act == "crash":
        print("Fatal: a crash", file=sys.stderr, flush=True)
        os.abort()
    if act == "leave children":
        subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", rest])
        subprocess.run(["sh", "-c", f"sleep 61 & echo {rest}"], check=True)  # an orphan
        return 0
    if act == "stop when told" and starts <= 2:
        received: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        (directory / "ready").touch()
        while not received:
            time.sleep(0.02)
        (directory / f"saved-{starts}").touch()
        return 128 + signal.SIGTERM
    if act == "be deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (directory / "ready").touch()
        time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
