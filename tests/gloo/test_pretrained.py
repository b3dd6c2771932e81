"""Safetensors as transformers has them: straight into shards, only what a rank owns, and back into what `from_pretrained` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.patches import replaced
from support.reading import Counting
from support.state import same_bits, whole_state
from torch import Tensor, nn

import zcompile
from zcompile import CheckpointError, full_state_dict, hierarchical_zero, pretrained

SETTINGS: dict[str, Any] = {"topology": "2x2", "plan": "zero_topo", "compile": False}


def t5(seed: int = 0) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=41,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def logits(model: Any) -> Tensor:
    ids = torch.arange(12).view(2, 6) % 41
    found: Tensor = model.eval()(**({"labels": ids} if "T5" in type(model).__name__ else {}), input_ids=ids).logits
    return found.detach()


def _round_trip(rank: int, root: str) -> None:
    for make in (t5, llama):
        plain, saved = make(), f"{root}/{make.__name__}"
        expected = logits(plain)
        if rank == 0:
            plain.save_pretrained(saved, max_shard_size="20KB")
            assert (Path(saved) / pretrained.INDEX).exists()
        torch.distributed.barrier()

        # from the meta device, straight into shards
        read: list[int] = []
        original = pretrained._opened
        with replaced(pretrained, "_opened", lambda file, original=original, read=read: Counting(original(file), read)):
            with torch.device("meta"):
                bare = make(seed=5)
            model: Any = hierarchical_zero(bare, pretrained=saved, **SETTINGS)
        owned = sum(slot.shard.numel() for slot in model.zero.slots)
        assert sum(read) == owned, f"read {sum(read)} elements, owns {owned}"
        same_bits(full_state_dict(model), plain.state_dict())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)

        # into a model that has values, and back out
        other: Any = hierarchical_zero(make(seed=6), **SETTINGS)
        zcompile.load_pretrained(other, saved)
        same_bits(whole_state(other), plain.state_dict())
        for name, settings in {"one": {}, "many": {"file_bytes": 20_000}, "bf16": {"dtype": torch.bfloat16}}.items():
            folder = f"{root}/{make.__name__}-{name}"
            zcompile.export(other, folder, **settings)  # type: ignore[arg-type]
            loaded = type(plain).from_pretrained(folder, dtype=settings.get("dtype", torch.float32))
            tensors = {k: v.to(settings.get("dtype", torch.float32)) for k, v in plain.state_dict().items()}
            same_bits(dict(loaded.state_dict()), tensors)
            if name != "bf16":
                assert torch.equal(logits(loaded), expected)
        files = {file.name for file in Path(f"{root}/{make.__name__}-many").glob("*.safetensors")}
        weights = json.loads(Path(f"{root}/{make.__name__}-many", pretrained.INDEX).read_text())["weight_map"]
        assert len(files) > 1 and set(weights.values()) == files

        whole = full_state_dict(other, rank0_only=True, cpu_offload=True)
        if rank == 0:
            same_bits(whole, plain.state_dict())
        else:
            assert whole == {}


@pytest.mark.slow
def test_transformers_checkpoints_go_into_shards_and_come_back(ranks: Any, tmp_path: Path) -> None:
    ranks(4).run(_round_trip, str(tmp_path), timeout=200)


class Tabled(nn.Module):
    """Nothing here can give itself values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 2))
        self.table: Tensor
        self.register_buffer("table", torch.arange(5.0))


def _bad(rank: int, root: str) -> None:
    plain = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model = hierarchical_zero(plain, topology="2", plan="zero3", compile=False, sync_init=True)
    before = whole_state(model)

    def folder(name: str, change: Callable[[Path], Any]) -> str:
        made = Path(root, name)
        if rank == 0:
            made.mkdir()
            change(made)
        torch.distributed.barrier()
        return str(made)

    state = {name: torch.zeros(value.shape) for name, value in before.items()}
    one = pretrained.WEIGHTS
    cases: dict[str, tuple[str, tuple[str, ...]]] = {
        "none": (folder("none", lambda f: (f / "pytorch_model.bin").touch()), ("no *.safetensors", "pickles")),
        "few": (folder("few", lambda f: save_file({"0.bias": state["0.bias"]}, f / one)), ("lacks 3 parameters", "0.weight")),
        "more": (folder("more", lambda f: save_file({**state, "2.x": torch.ones(1)}, f / one)), ("not: 2.x",)),
        "shape": (
            folder("shape", lambda f: save_file({**state, "1.weight": torch.ones(3, 8)}, f / one)),
            (one, "'1.weight' has shape (3, 8)", "(3, 7)"),
        ),
        "cut": (folder("cut", lambda f: (save_file(state, f / one), os.truncate(f / one, 200))), (one, "cannot be read")),
        "index": (
            folder("index", lambda f: (f / pretrained.INDEX).write_text('{"weight_map": {"0.bias": "gone.safetensors"}}')),
            ("gone.safetensors", "is not there"),
        ),
        **{
            f"index {number}": (
                folder(f"index {number}", lambda f, text=text: (f / pretrained.INDEX).write_text(text)),
                (pretrained.INDEX, "is damaged"),
            )
            for number, text in enumerate(('{"weight_map": {"0.bi', "[]", "{}", '{"weight_map": {"0.bias": 3}}', '{"weight_map": 1}'))
        },
    }  # fmt: skip
    for name, (path, words) in cases.items():
        try:
            zcompile.load_pretrained(model, path)
        except CheckpointError as error:
            assert all(word in str(error) for word in (*words, path)), f"{name}: {error}"
        else:
            raise AssertionError(name)
    same_bits(whole_state(model), before)
    zcompile.export(model, f"{root}/out")
    assert set(load_file(f"{root}/out/{one}")) == set(before)
    for call, words in (
        (lambda: zcompile.export(model, f"{root}/out"), "exists"),
        (lambda: zcompile.export(model, f"{root}/x", dtype=torch.int8), "floating point"),
        (lambda: zcompile.export(model, f"{root}/x", file_bytes=0), "file_bytes=0"),
    ):
        try:
            call()
        except (CheckpointError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    # a buffer that has its values in the files alone
    table = folder("table", lambda f: save_file({"table": torch.arange(5.0), "weight": torch.ones(3, 2)}, f / one))
    with torch.device("meta"):
        tabled = Tabled()
    wrapped: Any = hierarchical_zero(tabled, topology="2", plan="zero3", compile=False, pretrained=table)
    assert torch.equal(wrapped.table, torch.arange(5.0)) and torch.equal(
        whole_state(wrapped)["weight"], torch.ones(3, 2)
    )
    # a model's own prefix: files of the bare model
    torch.manual_seed(0)
    full = llama()
    bare = folder("bare", lambda f: full.model.save_pretrained(f))
    head = {"lm_head.weight": full.lm_head.weight.detach().clone()}
    if rank == 0:
        save_file({**load_file(f"{bare}/{one}"), **head}, f"{bare}/{one}", metadata={"format": "pt"})
    torch.distributed.barrier()
    other = hierarchical_zero(llama(3), topology="2", plan="zero3", compile=False, pretrained=bare)
    same_bits(whole_state(other), dict(llama(0).state_dict()))


def test_files_that_do_not_fit_are_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(_bad, str(tmp_path), timeout=120)
