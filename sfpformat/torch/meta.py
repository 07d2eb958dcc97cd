"""Creation of modules with parameters on the meta device, and checks that no tensor stays there.

Rules: non-persistent buffers are not in files; only the module's own code can compute them. Therefore buffers
are created as usual, and only parameters are put on the meta device.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import MismatchError, warn
from ..names import listed
from .tensors import is_wrapper


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Context in which new modules have their parameters on the meta device, where they take no memory.

    Buffers are computed as usual. `load_model` and `compress_model` allocate the parameters, so that nothing
    stays on the meta device. ``torch.device("meta")`` would also put buffers on the meta device; the
    non-persistent ones, such as positions and rotary frequencies, are not in files.

    Ties are kept. Parameters of lazy modules, and tensor subclasses with their own operators, are unchanged.
    The context affects only the thread that enters it.

    Example: ``with parameters_on_meta(): model = Model(config)``, then ``load_model(model, path)``.
    """
    thread = threading.get_ident()
    made = WeakIdKeyDictionary()  # original parameter -> its meta parameter, one for all ties

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        if parameter.is_meta or is_lazy(parameter) or is_wrapper(parameter):
            return None
        if parameter not in made:
            meta_parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            meta_parameter.__dict__.update(parameter.__dict__)
            made[parameter] = meta_parameter
        found: nn.Parameter = made[parameter]
        return found

    hook: Any = on_meta  # torch's type annotation omits that a hook can return a parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def left_on_meta(model: nn.Module, filled: Collection[str]) -> list[str]:
    """Returns the names of parameters and buffers that are on the meta device and will stay there.

    Args:
        model: any module.
        filled: the names of the tensors that will be allocated.
    """
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return [name for name, tensor in tensors if name not in filled and not is_lazy(tensor) and tensor.is_meta]


def require_none_left(model: nn.Module, filled: Collection[str], strict: bool) -> None:
    """Refuses tensors that stay on the meta device, or warns of them.

    Args:
        model, filled: as in `left_on_meta`.
        strict: True raises, False warns.

    Raises:
        MismatchError: ``strict`` is true and some tensors stay.
    """
    left = left_on_meta(model, filled)
    if not left:
        return
    message = f"the file does not fill {listed(left)}, which would stay on the meta device"
    if set(left) & dict(model.named_buffers(remove_duplicate=False)).keys():
        message += "; create the model under sfpformat.torch.parameters_on_meta(), which computes its buffers"
    if strict:
        raise MismatchError(message, left)
    warn(message)
