"""Checkpoints whose tensors transformers renames and joins on loading: straight into shards all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.patches import replaced
from support.reading import Counting
from support.state import same_bits, whole_state
from torch import Tensor

import zcompile
from zcompile import CheckpointError, full_state_dict, hierarchical_zero, pretrained

SETTINGS: dict[str, Any] = {"topology": "2x2", "plan": "zero_topo", "compile": False}


def mixtral(seed: int = 0) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        num_local_experts=11, num_experts_per_tok=2, experts_implementation="batched_mm",
    ))  # fmt: skip


def neox(seed: int = 0) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
    ))  # fmt: skip


def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=torch.arange(12).view(2, 6) % 41).logits
    return found.detach()


def from_disk(rank: int, root: str) -> None:
    for make in (mixtral, neox):
        plain, saved = make(), f"{root}/{make.__name__}"
        if rank == 0:
            plain.save_pretrained(saved, max_shard_size="20KB")
        torch.distributed.barrier()
        names = {name for file in Path(saved).glob("*.safetensors") for name in load_file(file)}
        ours = set(plain.state_dict())
        odd = "embed_out.weight" if make is neox else "model.layers.0.block_sparse_moe.experts.10.w1.weight"
        assert odd in names - ours, "what is on disk is not what the module has"

        read: list[int] = []
        opened = pretrained._opened
        with replaced(pretrained, "_opened", lambda file, opened=opened, read=read: Counting(opened(file), read)):
            with torch.device("meta"):
                bare = make(seed=5)
            model: Any = hierarchical_zero(bare, pretrained=saved, **SETTINGS)
        owned = sum(slot.shard.numel() for slot in model.zero.slots)
        assert sum(read) == owned, f"read {sum(read)} elements, owns {owned}"
        same_bits(full_state_dict(model), plain.state_dict())
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)

        # back: transformers loads what the module's names are as well as what it writes itself
        zcompile.export(model, f"{root}/{make.__name__}-out")
        again = type(plain).from_pretrained(f"{root}/{make.__name__}-out", dtype=torch.float32)
        same_bits(dict(again.state_dict()), plain.state_dict())
        other: Any = hierarchical_zero(make(seed=6), **SETTINGS)
        zcompile.load_pretrained(other, f"{root}/{make.__name__}-out")
        same_bits(whole_state(other), plain.state_dict())


def test_mixtral_and_neox_from_disk_into_shards_and_back(ranks: Any, tmp_path: Path) -> None:
    ranks(4).run(from_disk, str(tmp_path), timeout=120)


def unfit(rank: int, root: str) -> None:
    saved = f"{root}/mixtral"
    if rank == 0:
        mixtral().save_pretrained(saved)
    torch.distributed.barrier()
    state = load_file(f"{saved}/{pretrained.WEIGHTS}")
    model: Any = hierarchical_zero(mixtral(1), topology="2", plan="zero3", compile=False)
    before = whole_state(model)
    expert = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    one, other = expert.format(3, "w1"), expert.format(3, "w3")
    cases: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
        "an expert is missing": (
            {name: value for name, value in state.items() if ".experts.10." not in name},
            ("gate_up_proj", "has shape (10, 48, 16)", "(11, 48, 16)"),
        ),
        "half of an expert is missing": (
            {name: value for name, value in state.items() if name != one},
            ("cannot be read straight into shards", "there are 10 like", "11 like"),
        ),
        "one is of another shape": ({**state, one: state[one][:, 1:].contiguous()}, (one, other, "(24, 15)", "does not fit beside")),
        "all of one kind are missing": (
            {name: value for name, value in state.items() if ".w3." not in name},
            ("there is none of .experts.*.w3.weight",),
        ),
        "a name that is nobody's": ({**state, expert.format(0, "w4"): state[one].clone()}, ("1 tensors that this model has not", "w4")),
    }  # fmt: skip
    for number, (name, (tensors, words)) in enumerate(cases.items()):
        folder = Path(root, str(number))
        if rank == 0:
            folder.mkdir()
            save_file(tensors, folder / pretrained.WEIGHTS)
        torch.distributed.barrier()
        try:
            zcompile.load_pretrained(model, folder)
        except CheckpointError as error:
            assert all(word in str(error) for word in (*words, str(folder))), f"{name}: {error}"
        else:
            raise AssertionError(name)
    same_bits(whole_state(model), before)


def test_experts_that_do_not_fit_are_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(unfit, str(tmp_path), timeout=120)
