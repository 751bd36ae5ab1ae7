import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from model.config import END_OF_TEXT, START_OF_TEXT, TEXT_PRESETS, TextConfig, TextTowerConfig
from model.text import TextEncoders, load_text_encoders, random_text_encoders, tokenize
from model.weights import fingerprint

CONFIG = TextConfig(
    clip_l=TextTowerConfig(width=24, layers=3, heads=2, activation="quick_gelu", pad_token=END_OF_TEXT),
    bigg=TextTowerConfig(width=32, layers=3, heads=4, activation="gelu", pad_token=0, projection_dim=16),
)
CAPTIONS = ["a photo of a cat", "", "word " * 100, "Größe &amp; Maß, 猫 🙂!"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Both towers with random weights in transformers' classes, saved as their folders, and the modules themselves."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)

    def config(tower):
        return CLIPTextConfig(
            hidden_size=tower.width,
            intermediate_size=4 * tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            hidden_act=tower.activation,
            projection_dim=tower.projection_dim or 512,
            initializer_factor=10.0,  # weights large enough that every layer matters
        )

    clip_l = CLIPTextModel(config(CONFIG.clip_l)).eval()
    bigg = CLIPTextModelWithProjection(config(CONFIG.bigg)).eval()
    clip_l.save_pretrained(folder / "clip_l")
    bigg.save_pretrained(folder / "bigg")
    return folder, clip_l, bigg


def test_full_size_towers_have_the_published_parameters():
    with torch.device("meta"):
        encoders = TextEncoders(TEXT_PRESETS["sdxl"])
    counts = [sum(weight.numel() for weight in tower.parameters()) for tower in (encoders.clip_l, encoders.bigg)]
    assert counts == [123_060_480, 694_659_840]
    assert TEXT_PRESETS["sdxl"].context_dim == 2048


def test_tokens_differ_in_their_padding_alone():
    tokens = tokenize(CAPTIONS, CONFIG)
    cat = [START_OF_TEXT, 320, 1125, 539, 320, 2368, END_OF_TEXT]
    assert tokens.clip_l[0].tolist() == cat + [END_OF_TEXT] * 70
    assert tokens.bigg[0].tolist() == cat + [0] * 70
    assert tokens.clip_l[1].tolist() == [START_OF_TEXT] + [END_OF_TEXT] * 76
    assert tokens.bigg[1].tolist() == [START_OF_TEXT, END_OF_TEXT] + [0] * 75
    assert torch.equal(tokens.clip_l[2], tokens.bigg[2])  # too long: no padding
    assert tokens.bigg[2, -1] == END_OF_TEXT
    with pytest.raises(TypeError, match="one string"):
        tokenize("a photo of a cat", CONFIG)


def test_tokens_equal_open_clips():
    import open_clip

    assert torch.equal(tokenize(CAPTIONS, CONFIG).bigg, open_clip.tokenize(CAPTIONS))


def test_encoders_equal_transformers(published, relative_error):
    folder, clip_l, bigg = published
    encoders = load_text_encoders(CONFIG, str(folder / "clip_l"), str(folder / "bigg"))
    tokens = tokenize(CAPTIONS, CONFIG)
    features = encoders(tokens)
    with torch.no_grad():
        left = clip_l(tokens.clip_l, output_hidden_states=True).hidden_states[-2]
        right = bigg(tokens.bigg, output_hidden_states=True)
    assert features.context.shape == (4, 77, CONFIG.context_dim)
    assert relative_error(features.context[..., :24], left) < 1e-5
    assert relative_error(features.context[..., 24:], right.hidden_states[-2]) < 1e-5
    assert relative_error(features.pooled, right.text_embeds) < 1e-5
    assert features.pooled.std(dim=0).mean() > 0.1
    files = [str(folder / tower / "model.safetensors") for tower in ("clip_l", "bigg")]
    assert torch.equal(load_text_encoders(CONFIG, *files)(tokens).context, features.context)


def test_bigg_loads_from_an_open_clip_file_without_its_image_tower(published, tmp_path, relative_error):
    from open_clip.model import CLIP

    folder, *_ = published
    torch.manual_seed(1)
    full = CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
        text_cfg={"width": 32, "heads": 4, "layers": 3},
    ).eval()
    file = str(tmp_path / "open_clip_model.safetensors")
    save_file(full.state_dict(), file)
    encoders = load_text_encoders(CONFIG, str(folder / "clip_l"), file)
    tokens = tokenize(CAPTIONS, CONFIG)
    with torch.no_grad():
        assert relative_error(encoders(tokens).pooled, full.encode_text(tokens.bigg)) < 1e-5

    pickled = str(tmp_path / "open_clip_pytorch_model.bin")
    torch.save({"state_dict": {f"module.{key}": value for key, value in full.state_dict().items()}}, pickled)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_text_encoders(CONFIG, str(folder / "clip_l"), pickled)
    again = load_text_encoders(CONFIG, str(folder / "clip_l"), pickled, allow_pickle=True)
    assert torch.equal(again(tokens).pooled, encoders(tokens).pooled)


def test_a_folder_with_pickles_alone_loads_where_it_is_allowed(published, tmp_path):
    folder, clip_l, _ = published
    clip_l.config.save_pretrained(tmp_path)
    torch.save(clip_l.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle"):
        load_text_encoders(CONFIG, str(tmp_path), str(folder / "bigg"))
    encoders = load_text_encoders(CONFIG, str(tmp_path), str(folder / "bigg"), allow_pickle=True)
    tokens = tokenize(CAPTIONS, CONFIG)
    with torch.no_grad():
        expected = clip_l(tokens.clip_l, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoders(tokens).context[..., :24], expected)


def test_a_name_is_looked_up_on_the_hub_and_its_pickles_are_left_there(published, monkeypatch):
    folder, *_ = published
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder / name.split("/")[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = load_text_encoders(CONFIG, "openai/clip_l", "laion/bigg")
    expected = load_text_encoders(CONFIG, str(folder / "clip_l"), str(folder / "bigg"))
    assert fingerprint(found) == fingerprint(expected)
    assert sorted(name for name, _ in asked) == ["laion/bigg", "openai/clip_l"]
    assert not any(pattern.endswith(".bin") for _, patterns in asked for pattern in patterns)


def test_weights_come_in_the_type_that_is_asked_for_and_frozen(published):
    folder, *_ = published
    encoders = load_text_encoders(CONFIG, str(folder / "clip_l"), str(folder / "bigg"), dtype=torch.bfloat16)
    assert {weight.dtype for weight in encoders.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in encoders.parameters())
    assert encoders(tokenize(CAPTIONS, CONFIG)).context.isfinite().all()


def test_clip_l_loads_from_a_folder_that_holds_the_image_tower_too(published, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    folder, clip_l, _ = published
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    full = CLIPModel(CLIPConfig(text_config=clip_l.config.to_dict(), vision_config=vision, projection_dim=8)).eval()
    full.save_pretrained(tmp_path)
    encoders = load_text_encoders(CONFIG, str(tmp_path), str(folder / "bigg"))
    tokens = tokenize(CAPTIONS, CONFIG)
    with torch.no_grad():
        expected = full.text_model(tokens.clip_l, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoders(tokens).context[..., :24], expected)


def test_weights_that_do_not_fit_the_config_are_refused(published):
    folder, *_ = published
    paths = str(folder / "clip_l"), str(folder / "bigg")
    for tower, wrong in (("clip_l", "hidden_act"), ("clip_l", "num_attention_heads"), ("bigg", "num_hidden_layers")):
        values = {"hidden_act": {"activation": "gelu"}, "num_attention_heads": {"heads": 3}}.get(wrong, {"layers": 4})
        other = dataclasses.replace(CONFIG, **{tower: dataclasses.replace(getattr(CONFIG, tower), **values)})
        with pytest.raises(ValueError, match=rf"config.json of text_encoder.*{wrong}"):
            load_text_encoders(other, *paths)
    wider = dataclasses.replace(CONFIG, bigg=dataclasses.replace(CONFIG.bigg, projection_dim=8))
    with pytest.raises(ValueError, match=r"shapes: \['text_projection"):
        load_text_encoders(wider, *paths)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_text_encoders(CONFIG, str(folder / "nowhere"), paths[1])
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*expected the folder of a text encoder"):
        load_text_encoders(CONFIG, str(folder), paths[1])
    with pytest.raises(ValueError, match="no weights"):
        load_text_encoders(CONFIG, paths[0], "ViT-bigG-14:no-such-tag")


def test_random_encoders_follow_from_the_seed_and_are_frozen():
    config = TEXT_PRESETS["tiny"]
    first, again, other = (random_text_encoders(config, seed) for seed in (0, 0, 1))
    tokens = tokenize(CAPTIONS, config)
    assert torch.equal(first(tokens).context, again(tokens).context)
    assert not torch.allclose(first(tokens).pooled, other(tokens).pooled)
    assert not first.training
    assert not any(weight.requires_grad for weight in first.parameters())
    assert not first(tokens).pooled.requires_grad


def test_words_can_be_read_from_random_features_by_a_linear_map():
    config = TEXT_PRESETS["tiny"]
    colors, shapes = ["red", "green", "blue", "yellow", "black"], ["circle", "square", "dog", "house", "tree"]
    pairs = [(i, c, s, b) for i, c in enumerate(colors) for s in shapes for b in colors]
    features = random_text_encoders(config, 0)(
        tokenize([f"a {c} {s} on a {b} background" for _, c, s, b in pairs], config)
    )
    assert 0.7 < features.context.std() < 1.4
    assert 0.7 < features.pooled.std() < 1.4
    label = torch.tensor([i for i, *_ in pairs])
    seen = torch.arange(len(pairs)) % 3 > 0
    inputs = features.pooled - features.pooled.mean(0)
    ridge = inputs[seen].T @ inputs[seen] + 0.1 * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(ridge, inputs[seen].T @ torch.nn.functional.one_hot(label[seen]).float())
    assert ((inputs[~seen] @ weight).argmax(1) == label[~seen]).float().mean() > 0.95
