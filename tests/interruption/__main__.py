"""The command `python -m interruption`: run `--kills 200`, or repeat a finding by `--job NAME --seed N`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAREFY_TUNE": "0"}

from helpers.hub_server import serving


def main(arguments: list[str] | None = None) -> int:
    """Kill the jobs, print statistics, and return 1 if there is a finding."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that files are removed
    parser = argparse.ArgumentParser("python -m interruption", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of all jobs together")
    parser.add_argument("--job", action="append", help="its name, or the beginning of several; default: all")
    parser.add_argument("--seed", type=int, help="repeat this kill of the job")
    parser.add_argument("--out", type=Path, help="write the figures and findings to this file as JSON")
    parser.add_argument("--machines", action="store_true", help="first on machines that lack space, memory or rights")
    parser.add_argument("--first-seed", type=int, default=0, help="begin at this one: other moments than before")
    options = parser.parse_args(arguments)
    with serving() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}  # before they are imported
        os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        import torch

        from interruption.commands import JOBS
        from interruption.kill_runs import Runner, shares
        from interruption.machines import Machines

        os.environ["HF_HUB_OFFLINE"] = "0"  # conftest has set it
        torch.set_num_threads(1)
        names = [j.name for j in JOBS]
        wanted = {n for w in options.job or [""] for n in ([w] if w in names else names) if n.startswith(w)}
        jobs = [j for j in JOBS if j.name in wanted]
        if not jobs:
            parser.error(f"--job: expected one of {', '.join(j.name for j in JOBS)}")
        runner = Runner(jobs, hub)
        machines = Machines(runner) if options.machines else None
        try:
            if machines is not None:
                machines.run()
            if options.seed is not None:
                runner.try_seed(jobs[0], options.seed)
            else:
                runner.run(shares(jobs, options.kills), options.first_seed) if options.kills else None
        except KeyboardInterrupt:
            print("interrupted")
        finally:
            runner.close()
            print(runner.statistics())
            figures = runner.to_dict()
            if machines is not None:
                print(machines.statistics())
                figures["machines"] = machines.to_dict()
            if options.out is not None:
                options.out.write_text(json.dumps(figures, indent=1))
    return 1 if runner.findings else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rarefy-kill-cache-") as cache:
        os.environ |= {"RAREFY_CACHE": cache, "HF_HOME": cache}  # not the user's
        status = main()
    sys.exit(status)
