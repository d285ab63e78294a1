"""Sampling, as the suite measures it."""

import contextlib
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.suite import Suite

Measurement = dict[str, Any]

GENERATION = "benchmarks.generation"
STREAMS = ((64, 128), (1, 4))  # slots, and responses
MANY = (64, 256, 1024)  # responses


def generate(suite: "Suite") -> Measurement:
    """Greedy responses, many at a time and one at a time, against the peer and against the limit.

    The limit is the larger of two times: bytes of weights and cache over the measured bandwidth of
    memory, and FLOPs over the measured rate of a matrix product: a large square one, and one of as
    many rows as there are slots (`share_of_limit_of_rows`).
    """
    points, repeats = [], {}
    for slots, requests in STREAMS:
        point, repeats[f"{slots}_slots"] = _generate(suite, slots, requests)
        points.append({"slots": slots, "responses": requests} | point)
    figures = {
        f"{name}_{point['slots']}_slots": value
        for point in points
        for name, value in point.items()
        if name
        in (
            "tokens_per_second",
            "tokens_per_second_to_peer",
            "share_of_limit",
            "share_of_limit_of_rows",
        )
    }
    return {"figures": figures, "points": points, "repeats": repeats}


def _generate(suite: "Suite", slots: int, requests: int) -> tuple[dict[str, Any], dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        spec = {"module": GENERATION, "slots": slots, "requests": requests}
        sides = {
            "matmul": stack.enter_context(suite.worker("matmul")),
            "rows": stack.enter_context(suite.worker("product_of_rows", **spec)),
            "bandwidth": stack.enter_context(suite.worker("bandwidth", module=GENERATION)),
            "ours": stack.enter_context(suite.worker("generate", **spec)),
        }
        peer = suite.peer_of("generate")  # reads what ours has written
        if peer is not None:
            sides["peer"] = stack.enter_context(peer)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(suite.repeats):
            for side, worker in sides.items():
                seconds[side].append(worker.repeat()["seconds"])
            took = ", ".join(f"{side} {times[-1]:.2f} s" for side, times in seconds.items())
            suite.say(f"  generate, {slots} slots {repeat + 1}/{suite.repeats}: {took}")
        ours, matmul, rows, bandwidth = (
            sides[k].info for k in ("ours", "matmul", "rows", "bandwidth")
        )
        peaks = {side: worker.finish()["peak_resident_bytes"] for side, worker in sides.items()}
    median = {side: statistics.median(times) for side, times in seconds.items()}
    by_compute = ours["flops"] * median["matmul"] / matmul["flops"]
    by_rows = ours["flops"] * median["rows"] / rows["flops"]
    by_memory = ours["read_bytes"] * median["bandwidth"] / bandwidth["bytes"]
    point = {
        "tokens_per_second": ours["tokens"] / median["ours"],
        "share_of_limit": max(by_compute, by_memory) / median["ours"],
        "share_of_limit_of_rows": max(by_rows, by_memory) / median["ours"],
        "limit_by_compute_seconds": by_compute,
        "limit_by_rows_seconds": by_rows,
        "limit_by_memory_seconds": by_memory,
        "cache_bytes": ours["cache_bytes"],
        "peak_resident_bytes": peaks["ours"],
    }
    if "peer" in sides:
        point["tokens_per_second_to_peer"] = median["peer"] / median["ours"]
    return point, seconds


def generate_many(suite: "Suite") -> Measurement:
    """The time a token takes by the number of responses, all with the same slots."""
    points = []
    for requests in MANY:
        spec = {"module": GENERATION, "slots": MANY[0], "requests": requests}
        with suite.worker("generate", **spec) as worker:
            seconds = [worker.repeat()["seconds"] for _ in range(suite.repeats)]
            tokens = worker.info["tokens"]
            worker.finish()
        token = statistics.median(seconds) / tokens
        points.append({"responses": requests, "tokens": tokens, "ms_a_token": 1000 * token})
        suite.say(f"  generate, {requests} responses: {1000 * token:.2f} ms a token")
    growth = points[-1]["ms_a_token"] / points[0]["ms_a_token"]
    return {"figures": {"token_time_growth": growth}, "points": points}


def prefix_caching(suite: "Suite") -> Measurement:
    """Calls that begin as those before them, with prefix caching and without, in turns."""
    points = []
    for kind in ("chat", "judge"):
        spec = {"module": GENERATION, "kind": kind}
        with (
            suite.worker("one_by_one", caching=True, **spec) as ours,
            suite.worker("one_by_one", caching=False, **spec) as without,
        ):
            runs = [(ours.repeat(), without.repeat()) for _ in range(suite.repeats)]
            for worker in (ours, without):
                worker.finish()
        seconds = [statistics.median(run[k]["seconds"] for run in runs) for k in (0, 1)]
        tokens = {name: runs[0][0][name] for name in ("prompt_tokens", "cached_tokens")}
        points.append({"kind": kind, "seconds": seconds[0], "without": seconds[1]} | tokens)
        took = ", ".join(f"{each:.2f} s" for each in seconds)
        suite.say(f"  one by one, {kind}: with and without caching {took} a call")
    figures = {
        f"{point['kind']}_to_without": point["without"] / point["seconds"] for point in points
    }
    return {"figures": figures, "points": points}
