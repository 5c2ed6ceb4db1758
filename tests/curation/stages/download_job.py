"""Downloads and canonicalizes a data set of URLs in a process of its own, that tests may kill."""

import json
import re
import sys
from pathlib import Path

import psutil

from curation.dataset import Dataset
from curation.pool import Pool
from curation.stage import StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.download import Download
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def main() -> None:
    urls, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    download = Download(**settings)
    download.open().close()
    before = psutil.Process().memory_info().rss
    pool = Pool.of(Dataset.open(urls))
    digests = {}
    for name, stage in (("download", download), ("canonicalize", Canonicalize())):
        folder = StageFolder(f"{out}/{name}", name)
        record, outputs = run_stage(stage, StageInputs(pool), folder, LocalEngine(), Silent())
        decisions = outputs.pop("decisions")
        pool = pool.with_stage(outputs, decisions)
        varying = stage.varying_outputs()
        digests[name] = {k: v for k, v in record.outputs.items() if k not in varying}
        digests[f"{name} dropped"] = record.dropped
    # Not ru_maxrss: that one begins with the size of the process which started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
    json.dump({"digests": digests, "before": before, "peak": peak}, sys.stdout)


if __name__ == "__main__":
    main()
