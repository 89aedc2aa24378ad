"""Check any stepwire server against the vectors.

    python conformance/run.py TARGET [--only PATTERN] [--steps N] [--all] [--json]

TARGET is `host:port`. Each case has one line with three errors. The first is the worst after the first steps, in ulps
of the update. The second is the worst later, by the parameters' scale. The third is the worst as a fraction of its
bound. The exit status is 1 if a case fails, 2 if there is no server. The program needs grpcio, protobuf, numpy and the
code generated from `proto/stepwire/v1`.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator

import grpc

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from conformance.checking import FAILED, NOT_SERVED, CaseResult, check
from conformance.stored_case import StoredCase, stored_cases

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check a stepwire server against the conformance vectors.")
    parser.add_argument("target", help="host:port of a server with plaintext connections")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names of cases, such as 'adam-*'")
    parser.add_argument("--steps", metavar="N", type=int, help="leave out checkpoints beyond step N, such as 10")
    parser.add_argument("--all", action="store_true", help="count a case that the server does not serve as a failure")
    parser.add_argument("--json", action="store_true", help="print one JSON list of results instead of lines")
    return parser


def _results(target: str, cases: Iterable[StoredCase], steps: int | None) -> Iterator[CaseResult]:
    with grpc.insecure_channel(target) as channel:
        for case in cases:
            yield check(channel, case, steps)


def _line(result: CaseResult) -> str:
    if result.outcome == NOT_SERVED:
        return f"{result.outcome:<10}  {result.case:<32}  {result.detail}"
    numbers = f"{result.ulps:8.2f} ulps  {result.relative:8.1e} relative  {result.fraction:8.3g} of the bound"
    failure = f"  {result.detail}" if result.outcome == FAILED else ""
    return f"{result.outcome:<10}  {result.case:<32}  {numbers}{failure}"


def _summary(results: Iterable[CaseResult]) -> Iterator[str]:
    """Yield a line for each rule: the numbers of passed and failed cases, and the worst case."""
    by_rule: dict[str, list[CaseResult]] = {}
    for result in results:
        by_rule.setdefault(result.rule, []).append(result)
    for rule, own in sorted(by_rule.items()):
        ran = [result for result in own if result.outcome != NOT_SERVED]
        passed = sum(result.outcome != FAILED for result in ran)
        counts = f"{rule:<10}  {passed} passed, {len(ran) - passed} failed, {len(own) - len(ran)} not served"
        worst = max(ran, key=lambda result: result.fraction, default=None)
        yield f"{counts}; worst: {worst.case}, {worst.fraction:.3g} of the bound" if worst else counts


def main(arguments: list[str] | None = None) -> int:
    """Check a server; return the exit status."""
    chosen = _parser().parse_args(arguments)
    cases = [case for case in stored_cases() if fnmatch.fnmatch(case.name, chosen.only)]
    if not cases:
        print(f"no case has the name {chosen.only!r}", file=sys.stderr)
        return 2
    results = []
    for result in _results(chosen.target, cases, chosen.steps):
        if result.detail.startswith("UNAVAILABLE"):
            print(f"{result.case}: {result.detail}", file=sys.stderr)
            return 2
        results.append(result)
        if not chosen.json:
            print(_line(result), flush=True)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        print("", *_summary(results), sep="\n")
    failures = {FAILED, NOT_SERVED} if chosen.all else {FAILED}
    return 1 if any(result.outcome in failures for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
