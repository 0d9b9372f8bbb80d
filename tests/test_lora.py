import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests import runs
from tests.conftest import build_model
from tuning.checkpoint.adapter import adapter_config, adapter_state, load_lora
from tuning.errors import SettingsError
from tuning.model.lora import add_lora, check_lora_targets, find_lora_targets
from tuning.model.token_rows import TokenRows
from tuning.model.training_model import TrainingModel, check_loss_path, check_positions

LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, tied=False)


def moe_model():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def test_targets_are_all_linear_layers_but_the_output(model):
    assert find_lora_targets(model) == LAYERS


def test_routers_are_never_adapted():
    model = moe_model()
    assert "gate" not in find_lora_targets(model)
    with pytest.raises(SettingsError, match="gate: a router"):
        check_lora_targets(model, ["gate"])
    adapted, _ = add_lora(model, r=2, alpha=4, dropout=0, target_modules=["q_proj", "v_proj"])
    assert {n.split(".")[-4] for n, p in adapted.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "model",
    [
        MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)),
        Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=64, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1, state_size=8
            )
        ),
    ],
)
def test_layers_that_peft_refuses_are_no_default_targets(model):
    adapted, _ = add_lora(model, r=2, alpha=4, dropout=0)
    assert {"in_proj"} <= adapted.peft_config["default"].target_modules <= {"in_proj", "x_proj"}
    adapted(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad), "an adapter that does nothing"
    with pytest.raises(SettingsError, match=r"--lora_target_modules out_proj: .*incompatible with Mamba"):
        check_lora_targets(model, ["out_proj"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "lm_head: the output layer; --train_embeddings full"),
        ("c_attn", "c_attn: no such layer; the model has down_proj"),
        ("mlp", "mlp: model.layers.0.mlp is a Qwen3MLP, not a linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted(model, target, message):
    with pytest.raises(SettingsError, match=message):
        check_lora_targets(model, [target])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r".*(q_proj|head)", "the output layer"),
        ("nothing.*", "no such layer"),
        (r".*\.mlp", "is a Qwen3MLP, not a linear layer"),
    ],
)
def test_patterns_that_cannot_be_adapted(model, pattern, message):
    with pytest.raises(SettingsError, match=message):
        check_lora_targets(model, pattern)


def test_a_pattern_adapts_what_peft_says_it_matches(tokenizer):
    peft_model, _ = add_lora(
        build_model(tokenizer, tied=False), r=2, alpha=4, dropout=0, target_modules=r".*\.0\..*\.(q|up)_proj"
    )
    adapted = {name.split(".lora_A")[0] for name, _ in peft_model.named_parameters() if "lora_A" in name}
    assert {".".join(name.split(".")[-4:]) for name in adapted} == {"layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"}


# ---- the side table ----


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_peft_trainable_tokens_in_logits_and_gradients(tokenizer, tied):
    """In float64, as the two add in another order, which in float32 shows more or less with the version of torch."""
    ids = [3, 9, 11]
    ours, rows = add_lora(
        build_model(tokenizer, tied=tied), r=2, alpha=4, dropout=0, embeddings="tokens", token_ids=ids
    )
    ours.double()
    rows.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*rows.parameters(), *(p for n, p in ours.named_parameters() if "lora_B" in n)]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    config, state = adapter_config(ours, rows), {n: t.detach().clone() for n, t in adapter_state(ours, rows).items()}
    theirs = get_peft_model(
        build_model(tokenizer, tied=tied), LoraConfig(**{**config.to_dict(), "inference_mode": False})
    )
    theirs.double()
    set_peft_model_state_dict(theirs, state)

    inputs = torch.tensor([[3, 1, 9, 11, 2, 3], [4, 5, 6, 7, 8, 9]])
    logits = [model(input_ids=inputs).logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits, atol=1e-12, rtol=1e-12)
    weight = torch.randn(logits[0].shape, generator=generator)
    for logit in logits:
        (logit * weight).sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    ours_rows = {n: (rows.embedding if "embed" in n else rows.output).grad for n in rows.state_in_peft_format()}
    assert len(ours_rows) == (1 if tied else 2)
    for name, gradient in ours_rows.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-10, rtol=1e-10)


def test_rows_are_megabytes_and_everything_else_is_frozen(tokenizer):
    model, rows = add_lora(
        build_model(tokenizer, tied=False), r=2, alpha=4, dropout=0, embeddings="tokens", token_ids=[3, 9]
    )
    assert sum(p.numel() for p in rows.parameters()) == 2 * 2 * 32
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in rows.parameters())


def test_scaled_embeddings_keep_their_scale():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = Scaled(10, 4), nn.Linear(4, 10, bias=False)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.head

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Model()
    inputs = torch.arange(10)
    before = model(inputs).detach()
    rows = TokenRows(model, {"embedding": [2, 5], "output": [2, 5]})
    torch.testing.assert_close(model(inputs), before)
    with torch.no_grad():
        rows.embedding.add_(1.0)
        rows.output.mul_(2.0)
    substituted = model(inputs).detach()
    rows.write_into(model)
    torch.testing.assert_close(model(inputs), substituted)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}])
def test_variants_of_lora_train(tokenizer, options):
    model, _ = add_lora(build_model(tokenizer, tied=False, attention_bias=True), r=2, alpha=4, dropout=0, **options)
    training_model = runs.TrainingModel(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    training_model(ids, torch.tensor([0, 1]), torch.tensor([2, 3])).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert ("magnitude" in " ".join(trained)) == bool(options.get("use_dora"))


def test_lora_plus_raises_the_learning_rate_of_b(checkpoints, tmp_path):
    _, template = runs.example_rows(checkpoints["untied"])
    training_model = runs.build(checkpoints["untied"], "tokens", template)
    from tuning.training.trainer import StepTrainer

    trainer = StepTrainer(
        training_model,
        runs.RunArguments(
            output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to="none"
        ),
        train_dataset=[],
        writer=None,
        loraplus_lr_ratio=16.0,
    )
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = {n: rates[id(p)] for n, p in training_model.named_parameters() if p.requires_grad}
    assert {rate for n, rate in names.items() if "lora_B" in n} == {1.6e-2}
    assert {rate for n, rate in names.items() if "lora_B" not in n} == {1e-3}


def test_other_architectures_are_found(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    assert find_lora_targets(gpt2) == ["c_attn", "c_fc", "c_proj"]
    model, _ = add_lora(gpt2, r=2, alpha=4, dropout=0)
    assert AutoModelForCausalLM is not None and model.peft_config["default"].r == 2


# ---- refused by name ----


def test_what_peft_would_load_otherwise_is_refused(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

    small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(SettingsError, match="peft drops the output layer's bias"):
        add_lora(PhiForCausalLM(PhiConfig(**small)), r=2, alpha=4, dropout=0, embeddings="tokens", token_ids=[1])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(SettingsError, match="cannot keep this model's tied matrices tied"):
        add_lora(gpt2, r=2, alpha=4, dropout=0, embeddings="full")
    with pytest.raises(SettingsError, match="--lora_bias all: the model has no biases"):
        add_lora(build_model(tokenizer, tied=False), r=2, alpha=4, dropout=0, bias="all")


def test_logits_that_are_not_the_output_layers_are_refused(model, monkeypatch):
    check_loss_path(TrainingModel(model))
    forward = type(model).forward

    def double(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", double)
    with pytest.raises(SettingsError, match="Qwen3ForCausalLM: its logits are not its output layer's"):
        check_loss_path(TrainingModel(model))


def test_models_that_are_not_decoder_and_output_layer_are_refused(model, monkeypatch):
    training_model = TrainingModel(model)
    monkeypatch.setattr(model, "get_decoder", lambda: lambda **_: [torch.zeros(1, 8, 3)])
    with pytest.raises(SettingsError, match="Qwen3ForCausalLM: not built as decoder and output layer"):
        check_loss_path(training_model)


def test_rows_beyond_learned_positions_are_refused(model):
    check_positions(TrainingModel(model), 10_000)  # rotary
    gpt2 = TrainingModel(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)))
    check_positions(gpt2, 64)
    with pytest.raises(SettingsError, match="a row has 65 tokens, the model learnt 64 positions"):
        check_positions(gpt2, 65)


def test_an_adapter_on_a_tied_output_layer_is_refused(tokenizer, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(build_model(tokenizer, tied=True), config).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="adapts the embedding or the output layer, which share one matrix"):
        load_lora(build_model(tokenizer, tied=True), tmp_path)
