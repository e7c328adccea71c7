"""One table from the JSON files of several runs of compare.py: RLX beside the fastest and the leanest peer of every row.

    python summary.py target/*.json
"""

import argparse
import json
from pathlib import Path

HEADER = "| table | threads | work | RLX | of limit | fastest peer | x | RLX peak MB | leanest peer |\n|---|---|---|---|---|---|---|---|---|"


def speed(row):
    work, ms = row["work"].partition(":")[0], row["median_ms"]
    return f"{ms:.2f} ms" if work == "embed" and ms < 100 else f"{row['tokens_per_s']:.0f}/s" if row["tokens_per_s"] >= 100 else f"{row['tokens_per_s']:.1f}/s"


def lines(report):
    rows = report["rows"]
    for text in dict.fromkeys(row["work"] for row in rows):
        here = [row for row in rows if row["work"] == text]
        own = [row for row in here if row["worker"].startswith("rlx")]
        peers = [row for row in here if not row["worker"].startswith("rlx")]
        if not own:
            continue
        for mine in own:
            suffix = mine["worker"].removeprefix("rlx")
            alike = [peer for peer in peers if not suffix.startswith(" ") or peer["worker"].endswith(suffix)]
            if not alike:
                continue
            best = min(alike, key=lambda row: row["median_ms"])
            lean = min(alike, key=lambda row: row["peak_rss_mb"])
            ratio = best["ratio_to_first"] / mine["ratio_to_first"]
            limit = f"{mine['of_limit']:.0%}" if mine.get("of_limit") else ""
            table = report["table"] + suffix + (f" {report['isa']}" if report.get("isa") else "")
            work = "texts" if text.startswith("texts") else text
            yield (
                f"| {table} | {report['threads']} | {work} | {speed(mine)} | {limit} | {best['worker']} {speed(best)} | "
                f"{ratio:.2f} | {mine['peak_rss_mb']:.0f} | {lean['worker']} {lean['peak_rss_mb']:.0f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    print(HEADER)
    for path in parser.parse_args().files:
        for line in lines(json.loads(path.read_text())):
            print(line)


if __name__ == "__main__":
    main()
