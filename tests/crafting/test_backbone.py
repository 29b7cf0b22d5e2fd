"""The backbone: what it shows of the routers, what it refuses, and that it is the dense one otherwise."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import disturb, tiny_model, tokens
from pesc import PescConfig, craft
from pesc.crafting.backbone import watch_routing
from pesc.method.losses import router_losses

METHOD = {"num_experts": [4, 3], "num_experts_per_tok": [2, 1], "adapter_dim": 8, "layers": [0, 2]}
COUNTED = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])


def crafted(family: str = "llama"):
    return disturb(craft(tiny_model(family), PescConfig(**METHOD)))


def balance_of(router_logits) -> torch.Tensor:
    return router_losses(router_logits=router_logits, num_experts_per_tok=[2, 1], mask=COUNTED.flatten())[0]


def test_router_logits_and_aux_loss_are_shown_when_asked_for() -> None:
    model = crafted()
    plain = model(tokens(), attention_mask=COUNTED, labels=tokens())
    out = model(tokens(), attention_mask=COUNTED, labels=tokens(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(22, 4), (22, 3)]
    assert torch.equal(out.aux_loss, balance_of(out.router_logits))
    assert torch.equal(out.loss, plain.loss)
    backbone = model.model(tokens(), attention_mask=COUNTED, output_router_logits=True)
    assert backbone.router_logits[1].equal(out.router_logits[1])
    as_tuple = model(tokens(), COUNTED, labels=tokens(), output_router_logits=True, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.aux_loss)
    assert "router_logits" not in plain


def test_what_is_shown_has_no_gradient() -> None:
    """So that a caller who adds aux_loss to his loss does not count it twice."""
    out = crafted().train()(tokens(), labels=tokens(), output_router_logits=True)
    assert not out.aux_loss.requires_grad
    assert not any(logits.requires_grad for logits in out.router_logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_in_training_only_gradients_differ(family: str) -> None:
    """Also by position, and as tuples."""
    model = crafted(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for call in ({"labels": tokens()}, {"labels": tokens(), "return_dict": False}, {}):
        evaluated, trained = model.eval()(tokens(), **call), model.train()(tokens(), **call)
        assert type(trained) is type(evaluated)
        assert torch.equal(evaluated[0], trained[0])
        gradients = []
        for outputs in (evaluated, trained):
            model.zero_grad()
            outputs[0].mean().backward()
            gradients.append([p.grad for name, p in model.named_parameters() if name.endswith("router.weight")])
        assert len(gradients[0]) == 2
        assert not any(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_hidden_states_and_attentions_are_the_dense_models(family: str) -> None:
    dense, asked = tiny_model(family), {"output_hidden_states": True, "output_attentions": True}
    dense.set_attn_implementation("eager")
    expected = dense(tokens(), **asked)
    model = craft(copy.deepcopy(dense), PescConfig(**METHOD))
    for out in (model(tokens(), **asked), model.train()(tokens(), labels=tokens(), **asked)):
        assert len(out.hidden_states) == len(out.attentions) + 1 == 4
        for name in ("hidden_states", "attentions"):
            assert all(torch.equal(one, other) for one, other in zip(out[name], expected[name], strict=True))
    assert out.hidden_states[-1].grad_fn.name() == "_CarryLossBackward"


def test_a_watcher_sees_each_pass_and_nothing_stays_behind() -> None:
    model = crafted().train()
    with watch_routing(model) as outer:
        model(tokens(), attention_mask=COUNTED)
        with watch_routing(model) as inner, torch.no_grad():
            model(tokens())
    model(tokens())
    assert (len(outer), len(inner), model.model.watchers) == (2, 1, ())
    assert outer[0].loss.requires_grad
    assert not inner[0].loss.requires_grad
    assert torch.equal(outer[0].aux_loss, balance_of(outer[0].router_logits))
    assert [int(counts.sum()) for counts in outer[0].counts()] == [2 * 18, 18]
    with watch_routing(tiny_model("llama")) as dense:
        pass
    assert dense == []


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = crafted().train()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.parametrize("switch", ["enabled", "before crafting", "left to torch"])
def test_reentrant_checkpointing_is_refused(switch: str) -> None:
    model = tiny_model("llama") if switch == "before crafting" else crafted()
    model.gradient_checkpointing_enable({} if switch == "left to torch" else {"use_reentrant": True})
    if switch == "before crafting":
        craft(model, PescConfig(**METHOD))
    model.enable_input_require_grads()
    with torch.no_grad():
        model.train()(tokens())
    with pytest.raises(ValueError, match='use gradient_checkpointing_kwargs={"use_reentrant": False}'):
        model(tokens())


def test_a_backbone_built_alone_is_refused_since_it_would_have_no_experts() -> None:
    model = crafted()
    with pytest.raises(ValueError, match="PescLlamaModel gets its experts from a causal LM"):
        type(model.model)(model.config)


def test_experts_that_another_library_leaves_out_are_missed() -> None:
    model = crafted().train()
    ffn = model.model.layers[2].mlp
    ffn.forward = type(ffn).dense_class.forward.__get__(ffn)
    with pytest.raises(ValueError, match="1 of 2 routers ran: another library has replaced"):
        model(tokens())


def test_experts_that_peft_freezes_are_named() -> None:
    wrapped = get_peft_model(crafted(), LoraConfig(target_modules=["q_proj"])).train()
    with pytest.warns(UserWarning, match=r'routers and experts are frozen .*modules_to_save=\["router", "experts"\]'):
        wrapped(tokens(), labels=tokens())
    for model in (crafted(), wrapped.eval()):
        with warnings.catch_warnings(action="error", category=UserWarning):
            model.train(model is not wrapped)(tokens(), labels=tokens())


def test_wrappers_that_copy_the_router_change_nothing() -> None:
    """peft's, with routers and experts among what it trains."""
    model = crafted().train()
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["router", "experts"])
    wrapped = get_peft_model(copy.deepcopy(model), lora).train()
    found = []
    for each in (model, wrapped):
        each(tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for name, p in each.named_parameters() if "router" in name and p.grad is not None])
    assert len(found[0]) == 2
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
