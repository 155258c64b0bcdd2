"""VideoMamba, of images and of videos, against the official code's outputs; inflation; merging across frames."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import mambatrim
from mambatrim.cli import main
from mambatrim.models import MODELS, checkpoint, videomamba
from mambatrim.models.videomamba import BACKWARD_DELTA, VideoMamba, VideoMambaConfig, convert, inflate

FIXTURES = (
    "videomamba_image_e32_d4_img64",
    "videomamba_video_e32_d4_f4_img64",
    "videomamba_video_e32_d4_f8_tubelet2_img48x80",
)
TINY = {"image_size": (32, 32), "patch": 8, "stride": 8, "d_model": 32, "depth": 4, "d_state": 4, "num_classes": 10}


def build(file) -> VideoMamba:
    """The model of a fixture, with its weights loaded as an official checkpoint is."""
    c = file.config
    size = c["img_size"]
    config = VideoMambaConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch=c["patch_size"],
        stride=c["patch_size"],
        d_model=c["embed_dim"],
        depth=c["depth"],
        num_classes=c["num_classes"],
        frames=c.get("num_frames"),
        tubelet=c.get("kernel_size", 1),
    )
    model = VideoMamba(config)
    model.load_state_dict(file.part("state."), strict=True)
    return model.eval()


def tiny(seed: int = 0, **changes) -> VideoMamba:
    torch.manual_seed(seed)
    model = VideoMamba(VideoMambaConfig(**{**TINY, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_the_official_code(golden, compare_with_official, form, name):
    file = golden(name)
    compare_with_official(build(file), file)


@pytest.mark.parametrize("name", ["image_tiny", "image_small", "image_middle", "image_base"])
def test_published_keys_and_shapes(golden_keys, name):
    check_keys(golden_keys, name, f"videomamba_{name.removeprefix('image_')}")


@pytest.mark.parametrize("name", ["video_tiny", "video_small", "video_middle"])
def test_published_keys_and_shapes_of_videos(golden_keys, name):
    check_keys(golden_keys, name, f"videomamba_{name.removeprefix('video_')}_f8")


def check_keys(golden_keys, name: str, model_name: str) -> None:
    official = golden_keys(f"videomamba_{name}")
    with torch.device("meta"):
        model = mambatrim.create_model(model_name, num_classes=1000)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == official["state"]
    assert sum(p.numel() for p in model.parameters()) == official["num_parameters"]


@pytest.mark.parametrize("name", videomamba.VARIANTS)
def test_entries_say_what_the_model_has(name):
    spec = MODELS[name]
    with torch.device("meta"):
        model = mambatrim.create_model(name)
    assert spec.checkpoint.parameters == sum(p.numel() for p in model.parameters())
    assert spec.checkpoint.entries == len(model.state_dict())
    assert spec.preprocess.size == spec.config.image_size and spec.licence == "Apache-2.0"
    assert model.num_patches() == (spec.config.frames or 1) * (spec.config.image_size[0] // 16) ** 2
    assert model.special_tokens() == (0,)


def test_names_files_and_parameter_counts_as_published():
    counts = {"tiny": (7_148_008, 7.034), "small": (25_796_584, 25.569), "middle": (74_217_448, 73.876)}
    for size, (image, video) in counts.items():
        assert MODELS[f"videomamba_{size}"].checkpoint.parameters == image
        assert round(MODELS[f"videomamba_{size}_f8"].checkpoint.parameters / 1e6, 3) == video
    files = {name: spec.checkpoint.file for name, spec in videomamba.VARIANTS.items()}
    assert files["videomamba_base"] == "videomamba_b16_in1k_res224.pth"
    assert files["videomamba_small_576"] == "videomamba_s16_in1k_res224to448to576.pth"
    assert files["videomamba_tiny_f64_384"] == "videomamba_t16_k400_f64_res224to384.pth"
    assert files["videomamba_middle_mask_f8"] == "videomamba_m16_k400_mask_ft_f8_res224.pth"
    assert files["videomamba_middle_mask_ssv2_f16_288"] == "videomamba_m16_ssv2_mask_ft_f16_res224to288.pth"
    unknown = [name for name, file in files.items() if not file]
    assert unknown == ["videomamba_middle_mask_f16", "videomamba_middle_mask_ssv2_f16"]
    assert len(files) == 58 and len(set(files.values())) == 57
    image, video = MODELS["videomamba_tiny"], MODELS["videomamba_tiny_ssv2_f8"]
    assert (image.preprocess.crop, image.preprocess.interpolation, image.preprocess.resize) == (
        0.875,
        "bicubic",
        (256, 256),
    )
    assert (video.preprocess.crop, video.preprocess.interpolation) == (1.0, "bilinear")
    assert (video.checkpoint.dataset, video.config.num_classes, video.checkpoint.top1) == (
        "Something-Something-v2",
        174,
        65.1,
    )


@pytest.mark.parametrize(
    ("name", "both", "paper", "digits"),
    [
        ("videomamba_middle", 16.326, 14.481, 3),
        ("videomamba_tiny_f8", 14.52, 11.54, 2),
        ("videomamba_small_f8", 47.08, 40.43, 2),
        ("videomamba_middle_f8", 130.02, 115.33, 2),
    ],
)
def test_published_flops(name, both, paper, digits):
    with torch.device("meta"):
        model = mambatrim.create_model(name)
    assert round(mambatrim.count_flops(model).total / 1e9, digits) == both
    # these figures leave out the class token that R-MeeTo's own counter embeds
    counted = mambatrim.count_flops(model, convention="paper").total - model.stem_cost().quirks
    assert round(counted / 1e9, digits) == paper


@torch.no_grad()
def test_directions_are_added_and_the_class_token_is_first():
    model = tiny()
    assert all(block.mixer.scale == 1.0 for block in model.blocks()) and model.special_tokens((48, 40)) == (0,)
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.pool(tokens), model.norm_f(tokens.x[:, 0]))


# --------------------------------------------------------------------------------------------------------------- videos


@torch.no_grad()
def test_positions_of_a_video_are_space_plus_time():
    model = tiny(frames=3, image_size=(16, 24))
    space, time = model.pos_embed[0], model.temporal_pos_embedding[0]
    x = model.positions((3, 2, 3))[0]
    assert torch.equal(x[0], space[0])
    for t in range(3):
        for place in range(6):
            assert torch.equal(x[1 + 6 * t + place], space[1 + place] + time[t])
    # twice as many frames: linear between them, ends not aligned
    longer = model.positions((6, 2, 3))[0]
    wanted = space[1] + 0.75 * time[0] + 0.25 * time[1]
    assert torch.allclose(longer[1 + 6], wanted, atol=1e-6)
    assert torch.allclose(longer[1], space[1] + time[0], atol=1e-6)


@torch.no_grad()
def test_any_number_of_frames_and_any_size():
    model = tiny(frames=4, tubelet=2)
    for sides in ((4, 32, 32), (2, 8, 8), (8, 24, 40), (5, 33, 32)):
        tokens = model.forward_features(torch.randn(1, 3, *sides))
        assert tokens.grid == (sides[0] // 2, sides[1] // 8, sides[2] // 8)
        assert tokens.x.shape[1] == model.num_patches(sides) + 1
    assert model.sides(48) == (4, 48, 48) and model.sides((16, 24)) == (4, 16, 24)
    longer = tiny(frames=4, tubelet=2)
    longer.resize((8, 24, 40))
    assert longer.temporal_pos_embedding.shape == (1, 4, 32) and longer.config.frames == 8
    x = torch.randn(1, 3, 8, 24, 40)
    assert torch.allclose(longer(x), model(x), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2x8x8 frames by pixels, got 1x32x32"):
        model(torch.randn(1, 3, 1, 32, 32))
    with pytest.raises(ValueError, match=r"videos must be \(B, 3, T, H, W\), got \(1, 3, 32, 32\)"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="frames must be at least the tubelet"):
        tiny(frames=1, tubelet=2)


@torch.no_grad()
def test_tokens_merge_across_frames():
    """A film of one picture: its patches find their like in other frames."""
    model = tiny(frames=4)
    film = torch.randn(2, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
    fast = mambatrim.reduce(model, schedule=mambatrim.Schedule((20, 0, 10, 0)))
    tokens = fast.forward_features(film)
    dest = tokens.origin.dest[:, 1:].unflatten(1, (4, 16))  # (B, t, h w)
    across = [
        len({t for t in range(4) if (dest[b, t] == token).any()}) > 1
        for b in range(2)
        for token in range(1, tokens.x.shape[1])
    ]
    assert any(across) and tokens.origin.dest[:, 0].eq(0).all()
    assert mambatrim.count_flops(fast).lengths == (65, 45, 45, 35)


@torch.no_grad()
def test_the_score_of_the_backward_direction_is_an_option():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    schedule = mambatrim.Schedule((6, 0, 0, 0))
    backward = mambatrim.methods.mtr(score=BACKWARD_DELTA)
    by_sum, by_one = (mambatrim.reduce(model, schedule=schedule, method=m) for m in ("mtr", backward))
    _, captured = model.blocks()[0](model.embed(images).x, ("dt_mean",))
    score = captured["dt_mean"][:, 1, 1:]  # (B, M)
    wanted = score.argsort(dim=1, stable=True)[:, :6].sort(dim=1).values + 1
    origin = by_one.forward_features(images).origin
    gone = [sorted(set(range(17)) - set(row)) for row in origin.keep.tolist()]
    assert gone == wanted.tolist()
    assert not torch.equal(by_sum.forward_features(images).origin.keep, origin.keep)
    assert mambatrim.count_flops(by_one).reduction < mambatrim.count_flops(by_sum).reduction


@torch.no_grad()
def test_the_forward_direction_cannot_reach_the_class_token():
    """The reason for that option: in the last block, patches change the class token through the backward scan only."""
    block = tiny().blocks()[-1]
    x = torch.randn(1, 17, 32)
    _, here = block(x, ("y_gated",))
    _, there = block(torch.cat([x[:, :1], torch.randn(1, 16, 32)], 1), ("y_gated",))
    assert torch.equal(here["y_gated"][:, 0, 0], there["y_gated"][:, 0, 0])
    assert not torch.allclose(here["y_gated"][:, 1, 0], there["y_gated"][:, 1, 0])


# ------------------------------------------------------------------------------------------------------------ inflation


@torch.no_grad()
def test_an_inflated_image_model_sees_each_frame_as_the_image_model_does():
    image = tiny()
    for frames, tubelet in ((4, 1), (6, 3)):
        video = VideoMamba(VideoMambaConfig(**TINY, frames=frames, tubelet=tubelet)).eval()
        state = image.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        video.load_state_dict(inflate(state, video.config), strict=True)
        assert all(torch.equal(state[name], before[name]) for name in before)
        film = torch.randn(2, 3, frames, 32, 32)
        x, seen = video.embed(film).x, film[:, :, tubelet // 2 :: tubelet]  # the centre of each tubelet
        for t in range(frames // tubelet):
            alone = image.embed(seen[:, :, t]).x
            assert torch.allclose(x[:, 1 + 16 * t : 17 + 16 * t], alone[:, 1:], atol=1e-5)
            assert torch.allclose(x[:, 0], alone[:, 0], atol=1e-6)


@torch.no_grad()
def test_inflation_resizes_space_and_time():
    short, config = tiny(frames=2), VideoMambaConfig(**{**TINY, "image_size": (40, 48)}, frames=4)
    state = inflate(short.state_dict(), config)
    short.resize((4, 40, 48))
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in VideoMamba(config).state_dict().items()
    }
    assert all(torch.equal(state[name], value) for name, value in short.state_dict().items())
    assert torch.equal(state["pos_embed"][:, 0], short.pos_embed[:, 0])


def test_inflation_says_what_does_not_fit():
    state, config = dict(tiny().state_dict()), VideoMambaConfig(**TINY, frames=4)
    with pytest.raises(ValueError, match="has no frames"):
        inflate(state, VideoMambaConfig(**TINY))
    with pytest.raises(ValueError, match="an entry pos_embed, and these have none"):
        inflate({name: value for name, value in state.items() if name != "pos_embed"}, config)
    with pytest.raises(ValueError, match="table of 15 patches is not that of a square grid"):
        inflate({**state, "pos_embed": state["pos_embed"][:, :-1]}, config)


@pytest.mark.parametrize("wrapper", ["", "model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module._orig_mod."])
def test_official_files_load_wrapped_or_bare(monkeypatch, tmp_path, wrapper, prefix):
    """With what training leaves beside the weights; image weights into a video model are inflated."""
    spec = MODELS["videomamba_tiny"]
    for name, frames in (("image", None), ("video", 4)):
        entry = replace(spec, name=name, config=VideoMambaConfig(**TINY, frames=frames))
        monkeypatch.setitem(MODELS, name, entry)
    image = tiny()
    state = {prefix + name: value for name, value in image.state_dict().items()}
    state |= {f"{prefix}distill_head.weight": torch.ones(10, 32), "clip_decoder.0.bias": torch.ones(3)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    loaded = mambatrim.create_model("image", weights=tmp_path / "w.pth")
    assert all(torch.equal(image.state_dict()[name], value) for name, value in loaded.state_dict().items())
    video = mambatrim.create_model("video", weights=tmp_path / "w.pth")
    wanted = inflate(image.state_dict(), video.config)
    assert all(torch.equal(wanted[name], value) for name, value in video.state_dict().items())
    more = mambatrim.create_model("video", weights=tmp_path / "w.pth", image_size=(8, 40, 40))
    assert more.sides() == (8, 40, 40) and more(torch.randn(1, 3, 8, 40, 40)).shape == (1, 10)


def test_files_that_do_not_fit_are_refused(monkeypatch):
    video = tiny(frames=4)
    spec = replace(MODELS["videomamba_tiny_f8"], config=VideoMambaConfig(**TINY, frames=8))
    with pytest.raises(ValueError, match=r"temporal_pos_embedding has the shape \(1, 4, 32\) and not \(1, 8, 32\)"):
        checkpoint.load(VideoMamba(spec.config), convert(video.state_dict(), spec.config), spec)
    # a model pretrained by masking has another name for the last norm, and no classifier
    pretrained = {name.replace("norm_f", "norm"): value for name, value in video.state_dict().items()}
    with pytest.raises(ValueError, match="norm_f.weight is missing"):
        checkpoint.load(video, convert(pretrained, video.config), spec)
    with pytest.raises(ValueError, match="the model has no temporal_pos_embedding"):
        checkpoint.load(tiny(), convert(video.state_dict(), VideoMambaConfig(**TINY)), spec)


def test_info_tells_about_videos(capsys):
    assert main(["info", "videomamba_tiny_f8", "--flops-reduction", "0.3", "--image-size", "288"]) == 0
    out = capsys.readouterr().out
    facts = ("8 frames of 288 x 288 pixels", "2593: 2592 patches, 1 special", "76.9 % on Kinetics-400", "Apache-2.0")
    assert [fact for fact in facts if fact not in out] == []
    assert main(["info", "videomamba_middle_mask_f8", "--json"]) == 0
    (dense,) = json.loads(capsys.readouterr().out)["results"]
    assert dense["figures"]["published_top1"] == 82.0 and dense["tokens"] == [1569] * 32
