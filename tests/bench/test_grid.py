from speclm.bench import (
    Cell,
    measure_grid,
    plain_decoder,
    prompt_lookup_decoder,
    read_records,
    speculative_decoder,
)


def test_records_come_one_by_one_and_a_second_run_has_nothing_to_do(tmp_path, tiny_base, calls_of):
    path = tmp_path / "grid.jsonl"
    cells = [Cell(calls_of(batch=size, max_new_tokens=2), {"batch": size}) for size in (1, 4)]
    methods = [
        plain_decoder(tiny_base),
        speculative_decoder("none", tiny_base, None),
        prompt_lookup_decoder(tiny_base),
    ]

    def run(some_cells):
        return measure_grid(some_cells, methods, base=tiny_base, benchmark="test", path=path)

    first = next(run(cells))
    assert first.record.settings == {"batch": 1, "method": "plain"}
    assert len(read_records(path)) == 1
    names = [(m.record.settings["batch"], m.comparison.method) for m in run(cells)]
    assert names == [(1, "none"), (1, "prompt_lookup"), (4, "plain"), (4, "none")]
    assert list(run(cells)) == []


def test_without_a_path_everything_is_measured(tiny_base, calls_of):
    cell = Cell(calls_of(max_new_tokens=2), {})
    methods = [speculative_decoder("none", tiny_base, None)]
    for _ in range(2):
        (measured,) = measure_grid([cell], methods, base=tiny_base, benchmark="test")
        assert measured.record.num_identical == 4
