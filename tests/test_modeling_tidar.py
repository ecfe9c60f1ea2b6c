"""Without drafts, the drafting class equals the stock class."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, T5Config

from helpers_tidar import FAMILIES, gated, plain_greedy_loop, random_prompts, tiny_tidar
from helpers_whole_masks import training_mask
from wavedraft.generation import tidar
from wavedraft.generation.execution.gated_linear import is_gated
from wavedraft.modeling_tidar import DraftObjective, TiDARConfig, TiDARForCausalLM
from wavedraft.modeling_tidar.modeling_tidar import write_adapter_code
from wavedraft.modeling_tidar.objective_tidar import mask_gate_of
from wavedraft.training import gated_adapter_config


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_logits_are_bit_for_bit_the_stock_models(family, tmp_path):
    model = tiny_tidar(family)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = TiDARForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_prompts(2, 11)

    assert type(stock) is model.stock_class
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert torch.equal(again(ids).logits, stock(ids).logits)
    assert torch.equal(model(ids, labels=ids).loss, stock(ids, labels=ids).loss)
    assert list(model.state_dict()) == list(stock.state_dict())


def test_a_saved_checkpoint_keeps_stock_architecture_and_says_how_it_drafts(tmp_path):
    tiny_tidar("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["tidar_config"] == {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 3}
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_tidar.TiDARQwen3ForCausalLM"}


def test_sharded_and_half_precision_checkpoints_come_back_whole(tmp_path):
    model = tiny_tidar(dtype=torch.bfloat16).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = TiDARForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_tidar(tie_word_embeddings=True).save_pretrained(tmp_path)
    again = TiDARForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_device_map_places_and_drafts(tmp_path):
    model = tiny_tidar()
    model.save_pretrained(tmp_path)
    placed = TiDARForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    prompt_ids = random_prompts(1, 5)
    expected = plain_greedy_loop(model, prompt_ids[0], num_new=12).tolist()
    assert placed.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0].tolist() == expected


def test_weights_offloaded_to_disk_draft_the_same(tmp_path):
    model = tiny_tidar()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    placed = TiDARForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    prompt_ids = random_prompts(1, 5)
    expected = plain_greedy_loop(model, prompt_ids[0], num_new=12).tolist()
    assert placed.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0].tolist() == expected


def test_resizing_the_vocabulary_moves_the_input_only_mask_id_to_its_end():
    model = tiny_tidar()
    prompt_ids = random_prompts(1, 5)
    model.resize_token_embeddings(70)
    assert model.tidar_config == TiDARConfig(draft_length=4, mask_token_id=70, mask_embedding_id=3)
    expected = plain_greedy_loop(model, prompt_ids[0], num_new=12).tolist()
    assert model.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0].tolist() == expected


def test_the_mask_id_reads_the_masks_embedding():
    model = tiny_tidar()
    assert torch.equal(model(torch.tensor([[5, 61, 7]])).logits, model(torch.tensor([[5, 3, 7]])).logits)


@torch.no_grad()
def looped_losses(model, input_ids, labels, draft_length):
    """The paper's two losses of one row [S] by definition: a doubled row, its dense mask, one label at a time."""
    length = len(input_ids)
    doubled = torch.cat([input_ids, torch.full_like(input_ids, model.tidar_config.mask_embedding_id)])[None]
    visible = training_mask(length, draft_length)[None, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.arange(length).repeat(2)[None]
    logprobs = model(doubled, attention_mask=additive, position_ids=positions).logits[0].log_softmax(-1)
    ar = [-logprobs[i - 1, labels[i]] for i in range(1, length) if labels[i] != -100]
    diffusion = [-logprobs[length + i, labels[i]] for i in range(length) if labels[i] != -100]
    return torch.stack(ar).mean(), torch.stack(diffusion).mean()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_loss_is_the_papers_and_reports_both_parts(family):
    model = tiny_tidar(family, draft_length=3, **({"sliding_window": 99} if family == "gemma2" else {}))
    input_ids = random_prompts(1, 10)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels, objective=DraftObjective(alpha=0.5))
    ar_loss, diffusion_loss = looped_losses(model, input_ids[0], labels[0], 3)
    torch.testing.assert_close(output.ar_loss, ar_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.diffusion_loss, diffusion_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, (0.5 * output.ar_loss + output.diffusion_loss) / 1.5)


def test_padding_does_not_touch_the_loss():
    model = tiny_tidar(draft_length=3)
    short = random_prompts(1, 7)
    padded = torch.nn.functional.pad(short, (0, 5), value=9)
    attention_mask = torch.tensor([[1] * 7 + [0] * 5])
    alone = model(short, labels=short, objective=DraftObjective())
    together = model(padded, labels=padded, attention_mask=attention_mask, objective=DraftObjective())
    torch.testing.assert_close(together.ar_loss, alone.ar_loss)
    torch.testing.assert_close(together.diffusion_loss, alone.diffusion_loss)


@pytest.mark.parametrize("first_token", [0, 2])
@pytest.mark.parametrize("mode", ["joint", "gated"])
def test_rows_of_a_batch_lose_what_each_loses_alone(mode, first_token):
    """Each row has blocks of its own where its labels stand; a row with fewer of them is filled up."""
    model = gated(tiny_tidar("qwen2", draft_length=3)) if mode == "gated" else tiny_tidar("qwen2", draft_length=3)
    objective = DraftObjective(mode=mode, first_token=first_token)
    ids, attention_mask = random_prompts(3, 13), torch.ones(3, 13, dtype=torch.long)
    attention_mask[1, 8:] = 0
    labels = ids.clone()
    labels[0, :9] = labels[1, :3] = labels[1, 8:] = labels[2, 5:8] = -100
    together = model(input_ids=ids, labels=labels, attention_mask=attention_mask, objective=objective)
    alone = []
    for row in range(3):
        kept = attention_mask[row] == 1
        alone.append(model(input_ids=ids[row : row + 1, kept], labels=labels[row : row + 1, kept], objective=objective))
    learnt = [(row[first_token:] != -100).sum().item() for row in labels]
    losses = [output.diffusion_loss.item() for output in alone]
    mean = sum(n * loss for n, loss in zip(learnt, losses, strict=True)) / sum(learnt)
    assert together.diffusion_loss.item() == pytest.approx(mean, rel=1e-5)


def test_a_packed_document_never_sees_another():
    model = tiny_tidar(draft_length=4)
    ids = random_prompts(1, 16)
    document_ids = torch.tensor([[0] * 9 + [1] * 7])
    labels = ids.masked_fill(document_ids == 1, -100)
    changed = torch.where(document_ids == 1, ids % 60 + 1, ids)
    objective = DraftObjective()
    before = model(ids, labels=labels, document_ids=document_ids, objective=objective)
    after = model(changed, labels=labels, document_ids=document_ids, objective=objective)
    assert torch.equal(before.loss, after.loss)


@torch.no_grad()
def test_slot_decay_weighs_each_slot_by_the_one_before_it():
    model = tiny_tidar(draft_length=3)
    ids = random_prompts(1, 9)
    by_slot = []
    for slot in range(3):
        labels = ids.masked_fill(torch.arange(9) % 3 != slot, -100)
        by_slot.append(model(ids, labels=labels, objective=DraftObjective()).diffusion_loss)
    whole = model(ids, labels=ids, objective=DraftObjective(slot_decay=0.5)).diffusion_loss
    torch.testing.assert_close(whole, (by_slot[0] + 0.5 * by_slot[1] + 0.25 * by_slot[2]) / 1.75)
    with pytest.raises(ValueError, match="slot_decay"):
        DraftObjective(slot_decay=0.0)


def test_gated_training_teaches_the_masks_and_only_the_adapter():
    model = tiny_tidar(draft_length=3)
    peft_model = gated(model)
    ids = random_prompts(2, 12)
    peft_model.train()
    output = peft_model(input_ids=ids, labels=ids, objective=DraftObjective(mode="gated"))
    output.loss.backward()
    trained = {name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all("lora_" in name for name in trained)


def test_gated_loss_is_the_same_with_activation_checkpointing():
    ids = random_prompts(2, 12)
    gradients = []
    for checkpointing in (False, True):
        peft_model = gated(tiny_tidar(draft_length=3))
        peft_model.train()
        if checkpointing:
            peft_model.enable_input_require_grads()
            peft_model.gradient_checkpointing_enable()
        output = peft_model(input_ids=ids, labels=ids, objective=DraftObjective(mode="gated"))
        output.loss.backward()
        gradients.append(
            (
                output.loss.detach(),
                peft_model.get_parameter("base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight").grad,
            )
        )
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], atol=1e-6, rtol=1e-4)


def test_a_gated_adapter_leaves_the_plain_logits_bit_for_bit_alone_and_changes_the_drafts():
    model = tiny_tidar(draft_length=4)
    ids = random_prompts(2, 9)
    logits = model(ids).logits
    text = plain_greedy_loop(model, ids[0], num_new=30)
    drafts = model.generate(ids[:1], max_new_tokens=30, return_dict_in_generate=True, do_sample=False)
    peft_model = gated(model)
    assert torch.equal(peft_model(input_ids=ids).logits, logits)
    output = peft_model.generate(input_ids=ids[:1], max_new_tokens=30, return_dict_in_generate=True, do_sample=False)
    assert output.sequences[0].tolist() == text.tolist() == drafts.sequences[0].tolist()


def test_the_gate_gives_pefts_own_numbers():

    ids = random_prompts(2, 9)
    stock_peft = gated(tiny_tidar())
    layers = stock_peft.base_model.model.model
    with torch.no_grad(), stock_peft.base_model._enable_peft_forward_hooks(alora_offsets=[3, 3]):
        expected = layers(ids).last_hidden_state
    gate = mask_gate_of(stock_peft)
    with torch.no_grad(), gate.open(3):
        found = layers(ids).last_hidden_state
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not torch.allclose(layers(ids).last_hidden_state[:, -3:], expected[:, -3:])


def test_a_closed_gate_leaves_the_model_as_it_found_it():
    """In a decode, other layers stand where the adapter's do; after it, and after an error, these are back."""
    from wavedraft.generation.execution.model_form import ModelForm, in_plain_form

    ids = random_prompts(2, 9)
    peft_model = gated(tiny_tidar())
    model = peft_model.base_model.model
    layers, before = model.model, [*model.named_modules()]
    with peft_model.disable_adapter(), torch.no_grad():
        expected = layers(ids).last_hidden_state
    with torch.no_grad(), in_plain_form(model, is_packed=False):
        assert not any("lora" in name for name, _ in layers.named_modules())
        assert torch.equal(layers(ids).last_hidden_state, expected)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), in_plain_form(model, is_packed=False):
        raise KeyboardInterrupt
    assert [*model.named_modules()] == before
    assert not any("forward" in module.__dict__ for _, module in before)
    form = ModelForm(model)
    with torch.no_grad(), form.applied(), form.forward(3, None, None):
        assert not torch.allclose(layers(ids).last_hidden_state, expected)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("change", ["written to", "new tensor", "scaled", "double", "optimizer"])
def test_the_gate_takes_an_adapter_as_it_is_now(change, is_frozen):
    from wavedraft.generation.execution.model_form import ModelForm

    ids = random_prompts(2, 9)
    model = gated(tiny_tidar())
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    layers = model.base_model.model.model

    def with_masks(is_through_peft: bool) -> torch.Tensor:
        if is_through_peft:
            with mask_gate_of(model).open(3):
                return layers(ids).last_hidden_state.detach()
        form = ModelForm(model.base_model.model)
        with torch.no_grad(), form.applied(), form.forward(3, None, None):
            return layers(ids).last_hidden_state.detach()

    if is_frozen:
        model.requires_grad_(False)
    before = with_masks(is_through_peft=False)
    if change == "optimizer":
        model.requires_grad_(True)
        with mask_gate_of(model).open(3):
            layers(ids).last_hidden_state.square().sum().backward()
        torch.optim.AdamW(adapter, lr=0.1, fused=True).step()
        model.requires_grad_(not is_frozen)
    for module in model.modules():
        if getattr(module, "lora_variant", None):
            if change == "written to":
                with torch.no_grad():
                    module.lora_B["default"].weight.mul_(-2)
            elif change == "new tensor":
                module.lora_A["default"].weight = torch.nn.Parameter(module.lora_A["default"].weight * 3, not is_frozen)
            elif change == "scaled":
                module.scaling["default"] *= 5
    if change == "double":
        model.double()
    found = with_masks(is_through_peft=False)
    assert found.dtype == torch.float64 if change == "double" else not torch.allclose(found, before)
    torch.testing.assert_close(found, with_masks(is_through_peft=True))


def test_a_gated_adapter_refuses_to_merge():
    model = tiny_tidar()
    peft_model = gated(model)
    model.generate(random_prompts(1, 4), max_new_tokens=4)  # puts the gate in
    with pytest.raises(NotImplementedError, match="merging"):
        peft_model.merge_and_unload()


def test_gated_mode_without_an_adapter_says_what_to_do():
    ids = random_prompts(1, 12)
    with pytest.raises(ValueError, match="gated_adapter_config"):
        tiny_tidar()(ids, labels=ids, objective=DraftObjective(mode="gated"))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "no `tidar_config`"),
        ({"mask_token_id": 61, "mask_embedding_id": 0}, "draft_length"),
        ({"draft_length": 0, "mask_token_id": 61, "mask_embedding_id": 0}, "at least 1"),
        ({"draft_length": 4, "mask_token_id": 61}, "from 0 to 60"),
        ({"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 61}, "from 0 to 60"),
        ({"draft_length": 4, "mask_token_id": -1, "mask_embedding_id": 3}, "0 or more"),
        ({"draft_length": 4, "mask_token_id": 5, "block": 3}, "unknown fields"),
    ],
)
def test_a_checkpoint_that_cannot_draft_is_refused_with_the_remedy(stored, message):
    config = tiny_tidar().config
    config.tidar_config = stored
    with pytest.raises(ValueError, match=message):
        TiDARForCausalLM.from_config(config)


def test_an_encoder_decoder_is_refused_by_name():
    with pytest.raises(ValueError, match="encoder-decoder"):
        TiDARForCausalLM.from_config(T5Config())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"draft_length": 9}, "between 1 and 4"),
        ({"draft_length": -1}, "between 1 and 4"),
        ({"draft_length": "4"}, "between 1 and 4"),
        ({"num_beams": 2, "custom_generate": tidar}, "num_beams"),
        ({"seed": [1, 2], "do_sample": True}, "each of the 1 rows"),
        ({"seed": -3}, "seed"),
        ({"draft_lenght": 3}, "draft_lenght"),
    ],
)
def test_a_bad_keyword_of_generate_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=4, **keywords)


def test_drafting_can_be_turned_off():
    model = tiny_tidar()
    prompt_ids = random_prompts(1, 4)
    expected = plain_greedy_loop(model, prompt_ids[0], num_new=8).tolist()
    assert model.generate(prompt_ids, max_new_tokens=8, do_sample=False, draft_length=0)[0].tolist() == expected


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}]
)
def test_beams_and_others_drafts_are_transformers_own(options, tmp_path):
    model = tiny_tidar()
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt_ids = random_prompts(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    assert model.generate(prompt_ids, **options).tolist() == stock.generate(prompt_ids, **options).tolist()


def test_beams_never_write_a_mask_token_of_the_vocabulary():
    model = tiny_tidar()
    prompt_ids = random_prompts(2, 6)
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False}
    wanted = int(model.generate(prompt_ids, **options)[0, 8])
    model.config.tidar_config = {"draft_length": 4, "mask_token_id": wanted}  # its own row is what masks read
    assert wanted not in model.generate(prompt_ids, **options)[:, 6:]
    assert wanted not in model.generate(prompt_ids, max_new_tokens=8, do_sample=False)[:, 6:]


@pytest.mark.parametrize("is_assistant", [True, False])
def test_assisted_decoding_takes_our_model_on_either_side(is_assistant, tmp_path):
    model = tiny_tidar()
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt_ids = random_prompts(1, 6)
    expected = stock.generate(prompt_ids, max_new_tokens=10, do_sample=False).tolist()
    main, assistant = (stock, model) if is_assistant else (model, stock)
    found = main.generate(prompt_ids, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert found.tolist() == expected


def test_options_in_the_generation_config_survive_saving(tmp_path):
    model = tiny_tidar()
    model.generation_config.draft_length = 2
    model.save_pretrained(tmp_path)
    again = TiDARForCausalLM.from_pretrained(tmp_path)
    output = again.generate(random_prompts(1, 4), max_new_tokens=6, return_dict_in_generate=True)
    assert output.accepted_lengths.shape == (1, 2)


@pytest.mark.parametrize("size", [69, 61, 56, 50])
def test_a_vocabulary_of_another_size_keeps_the_text_whoever_resized_it(tmp_path, size):
    """Masks read row 55 of 61: it stays, or is cut off."""
    model = tiny_tidar()
    model.config.tidar_config = {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 55}
    model.save_pretrained(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    stock.resize_token_embeddings(size)
    model.resize_token_embeddings(size)
    for name, one in (("stock", stock), ("ours", model)):
        with torch.no_grad():
            one.get_input_embeddings().weight.copy_(stock.get_input_embeddings().weight)
            one.get_output_embeddings().weight.copy_(stock.get_output_embeddings().weight)
        one.save_pretrained(tmp_path / name)
    prompt_ids = torch.tensor([[5, size - 1, 7, min(61, size - 2)]])
    expected = plain_greedy_loop(stock, prompt_ids[0], num_new=12).tolist()
    found = [model, TiDARForCausalLM.from_pretrained(tmp_path / "ours")]
    if size > 55:
        found.append(TiDARForCausalLM.from_pretrained(tmp_path / "stock"))
    else:
        with pytest.raises(ValueError, match="convert the checkpoint again"):
            TiDARForCausalLM.from_pretrained(tmp_path / "stock")
    for one in found:
        assert one.tidar_config == TiDARConfig(4, mask_token_id=size, mask_embedding_id=min(55, size - 1))
        assert torch.equal(one(prompt_ids).logits, stock(prompt_ids).logits)
        written = one.generate(prompt_ids, max_new_tokens=12, do_sample=False, num_branches="all")
        assert written[0].tolist() == expected
    by_keyword = {"custom_generate": tidar, "num_branches": "all", "max_new_tokens": 12, "do_sample": False}
    if size > 55:
        assert stock.generate(prompt_ids, **by_keyword)[0].tolist() == expected


@pytest.mark.parametrize("name", ["objective", "document_ids"])
def test_generate_refuses_what_is_of_a_training_step(name):
    value = DraftObjective() if name == "objective" else torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"`{name}` must be left out of `generate`"):
        tiny_tidar().generate(random_prompts(1, 3), max_new_tokens=2, **{name: value})


def test_a_step_of_the_stock_loss_forgets_how_often_drafts_stood():
    model, ids = tiny_tidar(), random_prompts(1, 8)
    model.generation_config.draft_acceptance = {"chances": [0.9, 0.8, 0.7], "num_prompts": 4}
    model(ids, labels=ids)
    assert model.generation_config.draft_acceptance, "evaluation changes no weight"
    model.train()(ids, labels=ids).loss.backward()
    assert getattr(model.generation_config, "draft_acceptance", None) is None


@pytest.mark.parametrize("size", [69, 58])
@pytest.mark.parametrize("is_loaded_before", [True, False])
def test_an_adapter_taught_before_the_vocabulary_changed_is_still_ours(tmp_path, size, is_loaded_before):
    tiny_tidar().save_pretrained(tmp_path / "model")
    model = TiDARForCausalLM.from_pretrained(tmp_path / "model")
    peft_model = get_peft_model(model, gated_adapter_config(model, 4))
    with torch.no_grad():
        for key, parameter in peft_model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path / "adapter")
    write_adapter_code(tmp_path / "adapter", model.tidar_config)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = TiDARForCausalLM.from_pretrained(tmp_path / "model")
    if is_loaded_before:
        model.load_adapter(str(tmp_path / "adapter"))
    for one in (stock, model):
        torch.manual_seed(1)
        one.resize_token_embeddings(size, mean_resizing=False)
    if not is_loaded_before:
        model.load_adapter(str(tmp_path / "adapter"))
    prompt_ids = torch.tensor([[5, 7, size - 1, min(61, size - 2), 9]])
    way = {"max_new_tokens": 16, "do_sample": False}
    stock.eval(), model.eval()
    assert torch.equal(model(prompt_ids).logits, stock(prompt_ids).logits)
    expected = stock.generate(prompt_ids, **way).tolist()
    drafted = model.generate(prompt_ids, **way, num_branches="all", return_dict_in_generate=True)
    assert drafted.sequences.tolist() == expected
    assert drafted.accepted_lengths.sum() and is_gated(model.peft_config["default"], model)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [size]
