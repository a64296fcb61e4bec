"""The commands `python -m stress sanitize`, `races` and `soak`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "RAREFY_TUNE": "0"}


def sanitize(options: argparse.Namespace) -> list[Any]:
    """Run random cases with each build that can be made here, and print what ran and was found."""
    from stress.sanitize import BUILDS, NAMES, run_build

    builds = [BUILDS[options.build]] if options.build else list(BUILDS.values())
    names = (options.case,) if options.case else NAMES
    results = []
    for build in builds:
        if why := build.missing():
            print(f"{build.name}: not run, {why}")
            continue
        results.append(run_build(build, 60 * options.minutes / len(builds), options.first_seed, names))
        print(results[-1], flush=True)
    return results


def races(options: argparse.Namespace) -> list[Any]:
    """Call models from several threads under ThreadSanitizer."""
    from stress.models import MODELS
    from stress.races import find_races

    found = find_races(list(MODELS), 60 * options.minutes / len(MODELS), options.first_seed)
    print(found)
    return [found]


def soak(options: argparse.Namespace) -> list[Any]:
    """Call each model many times from several threads."""
    from stress.models import MODELS
    from stress.soak import soak as run

    results = []
    for name in (n for n in MODELS if n.startswith(options.model)):
        results.append(run(name, options.calls))
        print(results[-1], flush=True)
    return results


def main() -> int:
    """Run a command; return 1 if something was found."""
    parser = argparse.ArgumentParser("python -m stress", description=__doc__)
    parser.add_argument("--out", type=Path, help="write what was found to this file as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (sanitize, races):
        command = commands.add_parser(function.__name__, help=str(function.__doc__))
        command.set_defaults(run=function)
        command.add_argument("--minutes", type=float, default=10.0, help="in all, without building")
        command.add_argument("--first-seed", type=int, default=0, help="begin at this one: other cases than before")
        if function is sanitize:
            command.add_argument("--build", choices=("sanitized", "emulated-sanitized", "threads"))
            command.add_argument("--case", help="its name; with --first-seed its first one is a finding again")
    command = commands.add_parser("soak", help=str(soak.__doc__))
    command.set_defaults(run=soak)
    command.add_argument("--calls", type=int, default=100_000, help="of each model")
    command.add_argument("--model", default="", help="its name, or the beginning of several")
    options = parser.parse_args()
    results = options.run(options)
    if options.out is not None:
        options.out.write_text(json.dumps([r.to_dict() for r in results], indent=1))
    return int(not all(r.passed for r in results))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rarefy-stress-cache-") as cache:
        os.environ["RAREFY_CACHE"] = cache  # not the user's
        status = main()
    sys.exit(status)
