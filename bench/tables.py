"""`python -m bench.tables`: write the tables of README.md and docs/ anew from the raw rows in bench/results/.

A page says where a table stands and which benchmarks are in it:

    <!-- bench:train attention -->
    <!-- /bench -->

Each file of results is one run on one machine; the newest run of a benchmark is shown. `--check` fails when a page is out of date.
"""

import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
MARK = re.compile(r"(<!-- bench:([\w ]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def newest_rows() -> dict[str, list[dict[str, Any]]]:
    """The rows of the newest run of every benchmark."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        by_bench: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(path.read_text()):
            by_bench.setdefault(row["bench"], []).append(row)
        for name, rows in by_bench.items():
            if name not in runs or rows[0]["date"] >= runs[name][0]["date"]:
                runs[name] = rows
    return runs


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(name: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    out = [
        f"`python -m bench {name}`, {first['device']}, {first['threads']} threads, {first['machine']}, {first['date'][:10]}:",
        "",
        "| case | figure | ours | peer | better by | of the roof |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        peer = "" if r["peer_value"] is None else f"{number(r['peer_value'])} ({r['peer']})"
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x"
        roof = "" if r["roof_percent"] is None else f"{r['roof_percent']:.0f} %"
        out.append(f"| {r['case']} | {r['metric']}, {r['unit']} | {number(r['ours'])} | {peer} | {ratio} | {roof} |")
    return "\n".join(out)


def main(check: bool) -> int:
    runs = newest_rows()
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = page.read_text()

        def fill(match: re.Match[str]) -> str:
            tables = [table(name, runs[name]) for name in match[2].split() if name in runs]
            return match[1] + "".join(t + "\n\n" for t in tables) + match[3]

        after = MARK.sub(fill, before)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    if stale:
        print(f"{'out of date' if check else 'wrote'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
