"""Models of diffusers, timm and Lightning by the lines of the guide. Skipped without these libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfpformat.torch import load_file, load_model, parameters_on_meta, save_model

from .test_files import assert_same

pytestmark = [
    # Warnings of these libraries about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_a_unet_of_diffusers_is_loaded_for_its_pipeline(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_model(unet, tmp_path / "unet" / "model.sfp")

    with parameters_on_meta():
        new = diffusers.UNet2DModel.from_config(diffusers.UNet2DModel.load_config(tmp_path / "unet"))
    load_model(new, tmp_path / "unet" / "model.sfp")
    other = diffusers.DDPMPipeline.from_pretrained(tmp_path, unet=new.eval())
    images = []
    for each in (pipeline, other):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(each(num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_a_model_of_timm_is_loaded_by_its_name(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm", exc_type=ImportError)
    sizes = {"img_size": 32, "depth": 1, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    save_model(model, tmp_path / "vit.sfp")
    with parameters_on_meta():
        new = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    load_model(new, tmp_path / "vit.sfp")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(new(x), model(x))


def test_a_trained_module_of_lightning_is_written_and_loaded(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(batch)
            return out.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = Lit()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    inputs: Any = torch.randn(8, 4)
    trainer.fit(model, torch.utils.data.DataLoader(inputs, batch_size=4))
    assert not torch.equal(model.state_dict()["layers.0.weight"], start["layers.0.weight"])
    save_model(trainer.lightning_module, tmp_path / "lit.sfp")
    new = Lit()
    new.load_state_dict(load_file(tmp_path / "lit.sfp"), assign=True)
    assert_same(dict(new.state_dict()), dict(model.state_dict()))
