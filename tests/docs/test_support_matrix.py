from docs.make_support_matrix import PAGE, page, refusal


def test_the_support_matrix_is_what_the_script_makes_of_the_doors():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python docs/make_support_matrix.py"


def test_what_no_machine_has_run_is_not_called_proven():
    cpu, cuda = page().split("## CUDA, nccl")
    assert "| `fsdp2` | `32-true` | equal | equal | equal | equal | equal | equal | equal |" in cpu
    assert "| `deepspeed_3` | `32-true` | equal | equal | equal | equal | equal | 2 | 3 |" in cpu
    assert "| equal |" not in cuda
    assert "| trains |" not in cuda
    assert "| `fsdp2` | `32-true` | not run | not run | not run | not run | not run | not run | not run |" in cuda


def test_a_refused_cell_leads_to_the_line_that_the_run_would_end_with():
    line = refusal(strategy="deepspeed", precision="32-true", accelerator="cpu", task="sft")
    assert line.startswith(
        "trainer.strategy: must be auto, ddp, fsdp2, deepspeed_1, deepspeed_2 or deepspeed_3, got deepspeed."
    )
    number = page().split(f". `{line}`")[0].rpartition("\n")[2]
    assert f"| `deepspeed` | `32-true` | {' | '.join([number] * 7)} |" in page()


def test_the_page_lists_rollouts_under_16_mixed_apart():
    row = next(line for line in page().splitlines() if line.startswith("| `ddp` | `16-mixed` | not run"))
    cells = row.split(" | ")[2:]
    assert cells[:5] == ["not run"] * 5
    assert "not run" not in cells[5]
