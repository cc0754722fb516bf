import pytest
import timm
import torch

from rb_noisy.backbones import BACKBONES, FIXED_SIZE, build_backbone
from rb_noisy.errors import InputError


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("preact_resnet18", 11.17),  # Rice et al. 2020
        ("resnet18_cifar", 11.17),
        ("resnet34_cifar", 21.28),
        ("wrn_28_10", 36.5),  # Zagoruyko & Komodakis 2016, Table 4
        ("wrn_32_10", 46.2),
        ("wrn_34_10", 46.2),
        ("small_cnn", 0.312),
        ("strided_cnn", 0.166),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    digits = len(str(millions).split(".")[1])
    assert round(parameters(model) / 1e6, digits) == millions


@pytest.mark.parametrize("name", [n for n in BACKBONES if "wrn" not in n])
def test_a_backbone_is_a_timm_model_with_access_to_its_features(name):
    side = 28 if name in FIXED_SIZE else 16
    model = timm.create_model(name, num_classes=7, in_chans=2).eval()
    x = torch.rand(3, 2, side, side)
    features = model.forward_features(x)
    penultimate = model.forward_head(features, pre_logits=True)
    assert penultimate.shape == (3, model.num_features)
    logits = model(x)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(model.get_classifier()(penultimate), logits)
    model.reset_classifier(4)
    assert model(x).shape == (3, 4)
    maps = timm.create_model(name, in_chans=2, features_only=True)(x)
    assert [m.shape[1] for m in maps] == [f["num_chs"] for f in model.feature_info]
    if name != "small_cnn":  # its convolutions are unpadded, so its maps shrink a little further
        assert [side // m.shape[2] for m in maps] == [f["reduction"] for f in model.feature_info]


def test_width_scales_every_layer_of_a_residual_network():
    half = timm.create_model("preact_resnet18", width=0.5)
    assert round(parameters(half) / 1e6, 2) == 2.80  # a quarter of 11.17, but for the first and the last layer
    assert half.stem.out_channels == 32
    assert [f["num_chs"] for f in half.feature_info] == [32, 64, 128, 256]
    assert half(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match=r"width is 0.001"):
        build_backbone("preact_resnet18", num_classes=10, in_chans=3, width=0.001)


def test_strided_cnn_halves_the_image_and_doubles_the_channels_as_often_as_asked():
    model = timm.create_model("strided_cnn", in_chans=3, img_size=32, width=2, depth=3, batch_norm=True)
    assert model.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 128, 4, 4)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 3
    maps = timm.create_model("strided_cnn", in_chans=3, img_size=32, depth=3, features_only=True)(
        torch.rand(1, 3, 32, 32)
    )
    assert [m.shape[1:] for m in maps] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
    for options in ({"depth": 6}, {"depth": 0}, {"width": 0}):
        with pytest.raises(InputError, match="strided_cnn needs"):
            build_backbone("strided_cnn", num_classes=10, in_chans=3, img_size=32, **options)


def test_wildcards_find_the_networks():
    assert set(timm.list_models("*_cifar")) >= {"resnet10_cifar", "resnet18_cifar", "resnet26_cifar", "resnet34_cifar"}
    assert timm.list_models("wrn_3*") == ["wrn_32_10", "wrn_34_10"]


def test_global_pool_and_dropout_options_are_honoured():
    model = timm.create_model("preact_resnet18", num_classes=3, global_pool="max", drop_rate=0.5)
    x = torch.rand(2, 3, 32, 32)
    feature_map = model.eval().forward_features(x)
    torch.testing.assert_close(model.forward_head(feature_map, pre_logits=True), feature_map.amax((2, 3)))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model.forward_head(feature_map), model.forward_head(feature_map))


def test_the_first_block_is_the_pre_activation_form():
    """y = conv2(relu(bn2(conv1(relu(bn1(x)))))) + x, with nothing after the sum."""
    block = timm.create_model("preact_resnet18").eval().stages[0][0]
    x = torch.randn(2, 64, 8, 8)
    inner = block.conv1(block.bn1(x).relu())
    torch.testing.assert_close(block(x), block.conv2(block.bn2(inner).relu()) + x)


@pytest.mark.parametrize("name", ["resnet8_narrow", "resnet10t"])
def test_normalisation_is_inside_and_inputs_stay_in_0_1(name):
    torch.manual_seed(0)
    plain = build_backbone(name, num_classes=3, in_chans=1).eval()
    normalising = build_backbone(name, num_classes=3, in_chans=1, mean=[0.3], std=[0.2]).eval()
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith("normalize")}
    normalising.load_state_dict(state, strict=False)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(normalising(x), plain((x - 0.3) / 0.2))
    assert {k for k in normalising.state_dict() if k.startswith("normalize")} == {"normalize.mean", "normalize.std"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "preact_resnet81"}, "preact_resnet18"),
        ({"name": "small_cnn", "img_size": 8}, "at least 16x16"),
        ({"name": "resnet18_cifar", "mean": [0.1]}, "mean has 1 values for 3 channels"),
        ({"name": "resnet18_cifar", "colour": 1}, "does not take"),
    ],
)
def test_bad_networks_are_named(arguments, words):
    with pytest.raises(InputError) as error:
        build_backbone(num_classes=3, in_chans=3, **arguments)
    assert words in str(error.value)
