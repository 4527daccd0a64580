"""What test_ranks.py runs on every rank: exchanges, and what came out of them as one line of JSON; and a run with all
that rank 0 does alone: text of the model's own, tuning.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from calibration.errors import InputError
from calibration.hessian import Hessian
from calibration.ranks import join_ranks
from ptq import QuantSpec, quantize_model

ranks = join_ranks()
own = torch.full((ranks.rank + 1, 2), float(ranks.rank))
hessian, batches = Hessian(5, cross=True), torch.randn(7, 30, 5, generator=torch.Generator().manual_seed(0))
for x in batches[ranks.share(len(batches))]:
    hessian.add(x, 2 * x)
alone = Hessian(5, cross=True)
for x in batches:
    alone.add(x, 2 * x)
found = {
    "first": ranks.first,
    "sum": ranks.all_reduce(torch.tensor([1.5, ranks.rank])).tolist(),
    "rows": ranks.gather(own).tolist(),
    "columns": ranks.gather(own.T.to(torch.uint8), -1).tolist(),
    "from_first": [value.tolist() for value in ranks.from_first(lambda: {"x": torch.tensor(ranks.rank + 7)}).values()],
    "same_hessian": [torch.equal(*pair) for pair in zip(hessian.finalise(ranks), alone.finalise(), strict=True)],
    "devices": [ranks.device(name) for name in ("cpu", "cuda")],
    "spoke": ranks.speaks(),
    "patience": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.days,
}
try:
    ranks.device("cuda:0")
except InputError as error:
    found["refused"] = str(error)
folder = Path(sys.argv[1])
Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
spec = QuantSpec(**json.loads((folder / "spec.json").read_text()))
given = {"calibration": str(folder / "c.npy"), "heldout": "none", "device": "cpu"}
made = quantize_model(folder / "model", spec, out=folder / "out", ranks=ranks, **given)
assert (made is None) == (ranks.rank > 0)
ranks.finish()
