"""The command `python -m fuzz`: run `--minutes 30`, or repeat a finding by `--target NAME --seed N`."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RAREFY_TUNE": "0"}

from fuzz.run import HANG_SECONDS, Finding, Runner, Target, Usage, limit_memory


def repeat(target: Target, seed: int) -> int:
    """Read one mutation in this process, and let its exception pass."""
    runner = Runner([target])
    try:
        sample = runner.sample(target)
        change = sample.change(seed)
        for name, content in change.files.items():
            print(f"{name}: {len(content):,} bytes, {'under a hash' if change.is_covered else 'hashes agree'}")
        limit_memory()
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        outcome, _ = sample.try_seed(seed, Usage.now())
        faulthandler.cancel_dump_traceback_later()
    finally:
        runner.close()
    if isinstance(outcome, Finding):
        print(outcome.trace or outcome.text)
        return 1
    print("accepted" if outcome else "refused")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the targets, print statistics, and return 1 if there is a finding."""
    from fuzz.targets import available

    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for all targets together")
    parser.add_argument("--count", type=int, help="mutations of each target")
    parser.add_argument("--target", action="append", help="its name, or the beginning of several; default: all")
    parser.add_argument("--seed", type=int, help="repeat this mutation of the target")
    parser.add_argument("--out", type=Path, help="write the statistics and findings to this file as JSON")
    parser.add_argument("--first-seed", type=int, default=0, help="begin at this one: other mutations than before")
    options = parser.parse_args(arguments)
    targets = [t for t in available() if not options.target or any(t.name.startswith(n) for n in options.target)]
    if not targets:
        parser.error(f"--target: expected one of {', '.join(t.name for t in available())}")
    if options.seed is not None:
        exact = [t for t in targets if t.name in options.target] or targets
        return repeat(exact[0], options.seed)
    if options.minutes is None and options.count is None:
        options.minutes = 30.0
    runner = Runner(targets, options.first_seed)
    try:
        runner.run(options.minutes, options.count)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        runner.close()
        print(runner.statistics())
        if options.out is not None:
            options.out.write_text(json.dumps(runner.to_dict(), indent=1))
    for key, finding in runner.findings.items():
        print(
            f"{runner.repeats[key]:>6}x {finding.kind:24} {finding.target} --seed {finding.seed}  {finding.where}  {finding.text[:120]}"
        )
    return 1 if runner.findings else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rarefy-fuzz-cache-") as cache:
        os.environ["RAREFY_CACHE"] = cache  # not the user's
        status = main()
    sys.exit(status)
