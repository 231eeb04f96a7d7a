"""The table of mixers in seqmod's README says what the mixers say of themselves."""

from pathlib import Path

from seqmod.mixers import MIXERS


def test_the_table_of_mixers_is_true():
    lines = (Path(__file__).resolve().parents[2] / "seqmod" / "README.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| mixer | what |"))
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    start = lines.index(head) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("| `"):
            break
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        rows[cells["mixer"].strip("`")] = cells
    assert list(rows) == list(MIXERS)
    for name, mixer in MIXERS.items():
        cells = rows[name]
        said = {
            pattern
            for column, pattern in (("causal", "causal self"), ("bidirectional", "noncausal self"))
            if cells[column] == "yes"
        } | {f"{kind.strip()} cross" for kind in cells["cross"].split(",") if kind.strip()}
        assert said == mixer.patterns, name
        assert (cells["packs"] == "yes") == mixer.packs, name
        assert (cells["matrix"] == "yes") == (mixer.linear is not None), name
