"""Check any stepwire server against the vectors.

    python conformance/run.py TARGET [--only PATTERN] [--steps N] [--all] [--json]

TARGET is `host:port`. One line a case: its worst error after the first steps in ulps of the update, its worst error
later by the parameters' scale, and the largest part of what is allowed that anything took. The exit status is 1 if a
case fails, 2 if there is no server. Needs grpcio, protobuf, numpy and the code generated from `proto/stepwire/v1`.
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

from conformance.checking import FAILED, NOT_SERVED, Verdict, check
from conformance.stored_case import StoredCase, stored_cases

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check a stepwire server against the conformance vectors.")
    parser.add_argument("target", help="host:port of a server that takes plaintext connections")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names of cases, such as 'adam-*'")
    parser.add_argument("--steps", metavar="N", type=int, help="leave out checkpoints beyond step N, such as 10")
    parser.add_argument("--all", action="store_true", help="what the server does not serve is a failure too")
    parser.add_argument("--json", action="store_true", help="print one JSON list of verdicts instead of lines")
    return parser


def _verdicts(target: str, cases: Iterable[StoredCase], steps: int | None) -> Iterator[Verdict]:
    with grpc.insecure_channel(target) as channel:
        for case in cases:
            yield check(channel, case, steps)


def _line(verdict: Verdict) -> str:
    if verdict.outcome == NOT_SERVED:
        return f"{verdict.outcome:<10}  {verdict.case:<32}  {verdict.detail}"
    numbers = f"{verdict.ulps:8.2f} ulps  {verdict.relative:8.1e} relative  {verdict.share:8.3g} of what is allowed"
    failure = f"  {verdict.detail}" if verdict.outcome == FAILED else ""
    return f"{verdict.outcome:<10}  {verdict.case:<32}  {numbers}{failure}"


def _summary(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yield a line a rule: how many cases passed, and the worst of those that ran."""
    by_rule: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_rule.setdefault(verdict.rule, []).append(verdict)
    for rule, own in sorted(by_rule.items()):
        ran = [verdict for verdict in own if verdict.outcome != NOT_SERVED]
        passed = sum(verdict.outcome != FAILED for verdict in ran)
        counts = f"{rule:<10}  {passed} passed, {len(ran) - passed} failed, {len(own) - len(ran)} not served"
        worst = max(ran, key=lambda verdict: verdict.share, default=None)
        yield f"{counts}; worst: {worst.case}, {worst.share:.3g} of what is allowed" if worst else counts


def main(arguments: list[str] | None = None) -> int:
    """Check a server; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    cases = [case for case in stored_cases() if fnmatch.fnmatch(case.name, chosen.only)]
    if not cases:
        print(f"no case is called {chosen.only!r}", file=sys.stderr)
        return 2
    verdicts = []
    for verdict in _verdicts(chosen.target, cases, chosen.steps):
        if verdict.detail.startswith("UNAVAILABLE"):
            print(f"{verdict.case}: {verdict.detail}", file=sys.stderr)
            return 2
        verdicts.append(verdict)
        if not chosen.json:
            print(_line(verdict), flush=True)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
    else:
        print("", *_summary(verdicts), sep="\n")
    failures = {FAILED, NOT_SERVED} if chosen.all else {FAILED}
    return 1 if any(verdict.outcome in failures for verdict in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
