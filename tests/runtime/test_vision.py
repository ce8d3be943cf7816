"""Images: preprocessing, classification, and the way of a classifier from a module to an artifact that runs without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from vision_tiny import randomised, tiny, vit

import planc
from planc.compiler.cli import app
from planc.runtime.errors import InputError, PlancError
from planc.runtime.vision import Classifier, ImageSpec


def picture(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def compiled(module: Any, **options: Any) -> Classifier:
    exe = planc.compile(module, **options)
    assert isinstance(exe, Classifier)
    return exe


# ---- pixels ------------------------------------------------------------------------------------------------------------------------


def test_pixels_by_hand() -> None:
    spec, image = ImageSpec(size=(4, 6), mean=(1, 2, 3), std=(2, 4, 8)), picture(4, 6)
    made = spec.pixels(image)
    assert made.dtype == np.float32 and made.shape == (3, 4, 6) == spec.shape
    for channel in range(3):
        assert np.array_equal(made[channel], (image[..., channel].astype(np.float32) - (channel + 1)) / (2 << channel))
    flat = ImageSpec(size=(4, 6), mean=(1, 2, 3), std=(2, 4, 8), layout="NHWC")
    assert np.array_equal(flat.pixels(image), made.transpose(1, 2, 0)) and flat.shape == (4, 6, 3)


def test_crop_is_in_the_middle_and_keeps_the_aspect_ratio() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    spec = ImageSpec(size=10, resize=10, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    assert (spec.pixels(wide) == 200).all()
    assert spec.scaled((20, 20)) == ImageSpec(size=(20, 20), resize=20, mean=(0, 0, 0), std=(1, 1, 1))
    assert (ImageSpec(size=(5, 15), mean=(0, 0, 0), std=(1, 1, 1)).pixels(wide)[0, :, 7] == 200).all()


def test_files_grey_images_and_orientation(tmp_path: Path) -> None:
    spec = ImageSpec(size=(4, 6))
    Image.fromarray(picture(4, 6)).save(tmp_path / "a.png")
    assert np.array_equal(spec.pixels(tmp_path / "a.png"), spec.pixels(picture(4, 6)))
    grey = picture(4, 6)[..., 0]
    assert np.array_equal(spec.pixels(grey), spec.pixels(np.stack([grey] * 3, -1)))
    turned = Image.fromarray(picture(6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "b.png", exif=exif)
    assert np.array_equal(spec.pixels(tmp_path / "b.png"), spec.pixels(np.rot90(picture(6, 4), -1).copy()))


def test_refuses_what_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.jpg").write_bytes(b"not a picture")
    for image in (tmp_path / "no.jpg", tmp_path / "gone.jpg", np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), 7):
        with pytest.raises(InputError) as caught:
            ImageSpec(size=(4, 4)).pixels(image)
        assert caught.value.code == "input-invalid"
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert ImageSpec(size=(4, 4)).pixels(picture(4, 4)).shape == (3, 4, 4)  # the right size already
    with pytest.raises(InputError, match="Pillow") as caught:
        ImageSpec(size=(4, 4)).pixels(picture(5, 4))
    assert caught.value.code == "backend-missing" and "planc[vision]" in (caught.value.fix or "")


# ---- from a module to an artifact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "size"), [(tiny, (20, 18)), (vit, (16, 16))])
def test_artifact_equals_eager(module: Any, size: tuple[int, int], tmp_path: Path) -> None:
    exe = compiled(module(), image={"size": size}, out=tmp_path / "a", labels=[f"class {i}" for i in range(5)])
    shots = [picture(*size, seed=i) for i in range(3)]
    out = module()(torch.from_numpy(np.stack([exe.image.pixels(shot) for shot in shots])))
    want = (out if isinstance(out, torch.Tensor) else out.logits).detach().numpy()
    np.testing.assert_allclose(exe.logits(shots), want, rtol=1e-4, atol=1e-4)
    best = exe.classify(shots, top=2)
    assert [row[0].index for row in best] == list(want.argmax(1))
    assert exe.classify(shots[1], top=2) == exe.classify(shots[1:2], top=2)[0]
    assert all(p.label == (f"class {p.index}" if p.index < 5 else str(p.index)) for row in best for p in row)
    graph = onnx.load(str(tmp_path / "a" / "model.onnx"), load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {o.domain for o in graph.opset_import} == {""}
    copy = exe.save(tmp_path / "b")
    assert np.array_equal(planc.load(copy).logits(shots), exe.logits(shots))  # type: ignore[union-attr]
    reference = compiled(module(), image={"size": size}, plan={"target": {"backend": "reference"}})
    np.testing.assert_allclose(reference.logits(shots), want, rtol=1e-4, atol=1e-4)


def test_artifact_needs_no_torch(tmp_path: Path) -> None:
    exe = compiled(tiny(), image={"size": (20, 18)}, out=tmp_path / "a")
    np.save(tmp_path / "x.npy", picture(20, 18))
    code = (
        "import sys, numpy, planc; exe = planc.load(sys.argv[1]); print(exe.classify(numpy.load(sys.argv[2]))[0].index);"
        " assert not {'torch', 'onnx', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "x.npy"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == exe.classify(picture(20, 18))[0].index


def test_directory_of_transformers(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "model")
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    exe = compiled(str(tmp_path / "model"))
    assert exe.image.size == (16, 16) and exe.image.std == (63.75,) * 3 and exe.image.interpolation == "bilinear"
    assert exe.labels == tuple(f"LABEL_{i}" for i in range(5))
    want = vit()(torch.from_numpy(exe.image.pixels(picture(16, 16))[None])).logits.detach().numpy()
    np.testing.assert_allclose(exe.logits([picture(16, 16)]), want, rtol=1e-4, atol=1e-4)


def test_quantised_on_images_that_the_plan_names(tmp_path: Path) -> None:
    shots = [picture(20, 18, seed=i) for i in range(4)]
    (tmp_path / "shots").mkdir()
    for i, shot in enumerate(shots):
        Image.fromarray(shot).save(tmp_path / "shots" / f"{i}.png")
    plan = tmp_path / "plan.yaml"
    text = "planc: 1\npasses:\n  - quantize_static: {}\n  - patchwise: {grid: [2, 2]}\ncalibration: {images: %s, count: 3}\n"
    plan.write_text(text % "shots")
    exe, plain = (compiled(tiny(), image={"size": (20, 18)}, plan=p) for p in (plan, None))
    want = plain.logits(shots)
    assert 0 < np.linalg.norm(exe.logits(shots) - want) / np.linalg.norm(want) < 0.1
    assert "3 images" in exe.contract.effects[1].notes[0]
    for line, code in (("calibration: {text: a}", "plan-conflict"), ("calibration: {images: gone}", "input-invalid"), ("", "pass-refused")):
        plan.write_text("planc: 1\npasses:\n  - quantize_static: {}\n" + line)
        with pytest.raises(PlancError) as caught:
            compiled(tiny(), image={"size": (20, 18)}, plan=plan)
        assert caught.value.code == code
    with pytest.raises(PlancError, match="one of text and images"):
        planc.Plan.from_dict({"calibration": {"count": 3}})


def test_command_line(tmp_path: Path) -> None:
    compiled(tiny(), image={"size": (20, 18)}, out=tmp_path / "a", labels=list("abcdefg"))
    for i in range(2):
        Image.fromarray(picture(20, 18, i)).save(tmp_path / f"{i}.png")
    done = CliRunner().invoke(app, ["run", str(tmp_path / "a"), *(str(tmp_path / f"{i}.png") for i in range(2)), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    exe = planc.load(tmp_path / "a")
    assert isinstance(exe, Classifier)
    for row, shot in zip(result["images"], (picture(20, 18, i) for i in range(2)), strict=True):
        assert [c["label"] for c in row["classes"]] == [p.label for p in exe.classify(shot)]


def test_refuses() -> None:
    def code(*args: Any, **options: Any) -> str:
        with pytest.raises(PlancError) as caught:
            planc.compile(*args, **options)
        return caught.value.code

    assert code(tiny(), {"decode": {"max_new_tokens": 3}}, image=20) == "plan-conflict"
    assert code(tiny(), image={"size": 20, "resize": 3}) == "input-invalid"
    assert code("smollm2-135m", image=20) == "model-unsupported"
    assert code(randomised(torch.nn.Conv2d(3, 4, 3)), image=20) == "trace-failed"  # returns a map
    assert code(tiny(), image=20, labels="/no/such/file.txt") == "input-invalid"
    exe = compiled(tiny(), image={"size": (20, 18)})
    with pytest.raises(InputError, match="no image"):
        exe.classify([])
