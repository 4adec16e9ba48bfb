"""python scripts/process_faults.py --n=20 [--seed=0] [--directory=DIR]

Three processes train the model of 2m. At a random moment after they have joined, a random one is
killed, terminated, or stopped (SIGSTOP) for longer than the heartbeat of 10 s. All must end with a documented
exit code. They are started again to the end of the run, which must equal the uninterrupted one bit for bit:
every array of the last checkpoint and every row of metrics.jsonl except its times. Exits with 0 only then.
"""

import argparse
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the modules next to this one
from faulty_run import KILL, STOPPED, TERM, UPDATES, Run, end_all, outcome

COUNT, HEARTBEAT_S = 3, 10
STOP = signal.SIGSTOP


def main(argv: list[str]) -> int:
    """Runs the faults one after another; returns 0 if all ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "relora_process_faults"
    )
    args = parser.parse_args(argv)
    directory: Path = args.directory.absolute()
    whole = Run(directory / "whole", random.Random(0))
    if not (whole.workdir / "report.md").exists():
        codes, errors = ended(start(whole))
        assert codes == [0] * COUNT, "\n".join(errors)
    equal = 0
    try:
        for number in range(1, args.n + 1):
            line = fault(directory, whole, args.seed, number)
            equal += line.endswith(" equal") and "NOT" not in line
            print(line, flush=True)
    finally:
        end_all()
    print(f"{equal}/{args.n} ended bitwise equal")
    return 0 if equal == args.n else 1


def start(run: Run) -> list[subprocess.Popen[str]]:
    """Starts all processes of the run, on one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={address}", f"--processes={COUNT}", f"--heartbeat={HEARTBEAT_S}"]
    flags += ["--config.train.batch=6", "--config.train.microbatch=3"]
    return [run.start(*flags, f"--process={i}") for i in range(COUNT)]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """(exit codes, standard errors) of the processes, once all have ended."""
    outputs = [process.communicate(timeout=900) for process in processes]
    return [process.returncode for process in processes], [err for _, err in outputs]


def fault(directory: Path, whole: Run, seed: int, number: int) -> str:
    """One fault and its outcome, as a line."""
    rng = random.Random(f"{seed} {number}")
    folder = directory / f"{seed}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    run = Run(folder, rng)
    shutil.copytree(whole.rows.parent, run.rows.parent)
    processes, signal_number, victim = start(run), rng.choice((KILL, TERM, STOP)), rng.randrange(COUNT)
    u = rng.randrange(UPDATES)
    while run.last_update() < u and processes[0].poll() is None:
        time.sleep(0.02)
    processes[victim].send_signal(signal_number)
    if signal_number == STOP:
        others = [process for process in processes if process is not processes[victim]]
        ended(others)
        processes[victim].send_signal(signal.SIGCONT)
    codes, errors = ended(processes)
    documented = {KILL: {-KILL, STOPPED, 0}, TERM: {STOPPED, 0}, STOP: {STOPPED, 0}}[signal_number]
    again, _ = ended(start(run))
    same = outcome(run.workdir) == outcome(whole.workdir)
    fine = set(codes) <= documented and again == [0] * COUNT and same
    fine &= not any("Traceback" in error for error in errors)
    event = f"{number:3}  {signal.Signals(signal_number).name} to process {victim} after update {u}"
    if fine:
        shutil.rmtree(folder)
    else:  # the folder is kept, with what the processes said
        for process, text in enumerate(errors):
            (folder / f"{process}.stderr").write_text(text)
    return f"{event:50} {' '.join(map(str, codes)):14} {'' if fine else 'NOT'} equal"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
