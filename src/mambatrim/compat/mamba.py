"""`mamba_ssm.modules.mamba_simple.Mamba` with the directions of the forks, on our kernels.

Parameter names, their order and their first values (from the same random numbers) are those of the releases, so state
dicts and seeds carry over. Released: mamba_ssm 1.x and 2.x; Vim's fork (`bimamba_type`, `if_divide_out`, in older
copies `if_devide_out`, `init_layer_scale`); VideoMamba's fork (`bimamba`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..kernels.library import wide

DIRECTIONS = ("none", "v1", "v2")
States = tuple[Tensor, Tensor]  # the last K inputs of the convolution (B, E, K), the state of the scan (B, E, N)


@dataclass
class InferenceParams:
    """What `mamba_ssm.utils.generation` hands from call to call when tokens come one at a time."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, States] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def _mark(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """Set one of the flags that training scripts look for on a parameter."""
    setattr(parameter, name, True)
    return parameter


class Mamba(nn.Module):
    """The Mamba-1 mixer: (B, L, D) -> (B, L, D).

    Args:
        d_model, d_state, d_conv, expand, dt_rank: D, N, K, E / D, R ("auto": D / 16, rounded up).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: first values of the step-size projection.
        conv_bias, bias: whether the convolution, and the input and output projections, have one.
        use_fast_path: has no effect. (In the forks, False also leaves out the backward direction.)
        layer_idx: the key under which `inference_params` keeps the states of this mixer.
        bimamba_type: "none": from the first token to the last. "v1": added to it, a second scan of the same convolved
            tokens from the last to the first, with an A of its own. "v2": a second direction with a convolution,
            projections, A and D of its own (as released, its dt_proj_b starts like any linear layer).
        if_divide_out, if_devide_out: whether v2 averages its directions instead of adding them.
        init_layer_scale: first value of a factor `gamma` (D) on the output; None leaves it out.
        bimamba: VideoMamba's name for v2 without the average; it is True by default there, and has to be given here.

    Raises:
        ValueError: an unknown bimamba_type or dt_init.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool = False,
        bimamba: bool = False,
    ) -> None:
        super().__init__()
        if bimamba_type not in DIRECTIONS:
            raise ValueError(f"bimamba_type must be one of {', '.join(DIRECTIONS)}, got {bimamba_type!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx, self.init_layer_scale = use_fast_path, layer_idx, init_layer_scale
        self.bimamba_type = "v2" if bimamba else bimamba_type
        self.if_divide_out = if_divide_out or if_devide_out
        self.activation, self.act = "silu", nn.SiLU()
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), device=device, dtype=dtype))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias, device, dtype)
        self.conv1d, self.x_proj, self.dt_proj = self._direction(conv_bias, device, dtype)
        self._start_steps(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log, self.D = self._start_decay(device), self._start_skip(device)
        if self.bimamba_type != "none":
            self.A_b_log = self._start_decay(device)
        if self.bimamba_type == "v2":
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = self._direction(conv_bias, device, dtype)
            self.D_b = self._start_skip(device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias, device, dtype)

    def _direction(
        self, conv_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[nn.Conv1d, nn.Linear, nn.Linear]:
        inner, rank, taps = self.d_inner, self.dt_rank, self.d_conv
        return (
            nn.Conv1d(
                *(inner, inner, taps), groups=inner, padding=taps - 1, bias=conv_bias, device=device, dtype=dtype
            ),
            nn.Linear(inner, rank + 2 * self.d_state, False, device, dtype),
            nn.Linear(rank, inner, True, device, dtype),
        )

    @torch.no_grad()
    def _start_steps(self, shortest: float, longest: float, init: str, scale: float, floor: float) -> None:
        """Steps log-uniform between the shortest and the longest (arXiv 2312.00752, section 3.6)."""
        spread = self.dt_rank**-0.5 * scale
        if init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        elif init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            raise ValueError(f"dt_init must be 'constant' or 'random', got {init!r}")
        low, high = math.log(shortest), math.log(longest)
        bias = self.dt_proj.bias
        draws = torch.rand(self.d_inner, device=bias.device, dtype=bias.dtype)
        steps = torch.exp(draws * (high - low) + low).clamp(min=floor)
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        _mark(bias, "_no_reinit")

    def _start_decay(self, device: torch.device | str | None) -> nn.Parameter:
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        return _mark(nn.Parameter(states.log().repeat(self.d_inner, 1)), "_no_weight_decay")

    def _start_skip(self, device: torch.device | str | None) -> nn.Parameter:
        return _mark(nn.Parameter(torch.ones(self.d_inner, device=device)), "_no_weight_decay")

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None, T: int = 1) -> Tensor:
        """(B, L, D) -> (B, L, D). With inference_params, the states after the last token are kept there, and a call
        with an offset continues from them with one token. T, an argument of VideoMamba, has no effect, as there.

        Raises:
            NotImplementedError: inference_params with more than one direction.
        """
        if inference_params is None:
            x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, E) each
            return self._out(self._scan(x, z).y)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        scanned = self._scan(x, z)
        conv_state.copy_(F.pad(x.transpose(1, 2), (self.d_conv - x.shape[1], 0)))  # a negative pad cuts
        ssm_state.copy_(scanned.state[0])
        return self._out(scanned.y)

    def _scan(self, x: Tensor, z: Tensor) -> kernels.Scan:
        """x, z (B, L, E): the convolution and the scan in all directions, gated."""
        convs = [self.conv1d, self.conv1d_b] if self.bimamba_type == "v2" else [self.conv1d]
        u = kernels.causal_conv1d(
            x,
            [conv.weight.squeeze(1) for conv in convs],
            [conv.bias for conv in convs if conv.bias is not None],
            (False, True)[: len(convs)],
        )  # (S, B, L, E)
        lines = [self._line(u[0], self.x_proj, self.dt_proj, self.A_log, self.D)]
        if self.bimamba_type == "v1":
            u = u.expand(2, -1, -1, -1)
            lines.append(lines[0]._replace(A=self._decay(self.A_b_log), reverse=True))
        if self.bimamba_type == "v2":
            other = self._line(u[1], self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            lines.append(other._replace(reverse=True))
        averaged = self.bimamba_type == "v2" and self.if_divide_out
        return kernels.scan(u, lines, z, scale=0.5 if averaged else 1.0)

    def _line(self, u: Tensor, x_proj: nn.Module, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> kernels.Direction:
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (B, L, R), (B, L, N) twice
        return kernels.Direction(dt, self._decay(A_log), B, C, D, dt_proj.bias, dt_proj.weight)

    @staticmethod
    def _decay(A_log: Tensor) -> Tensor:
        """A (E, N), in fp32 also where the model was cast to less."""
        return -torch.exp(A_log.to(wide(A_log)))

    def _out(self, y: Tensor) -> Tensor:
        out = self.out_proj(y)
        return out if self.init_layer_scale is None else out * self.gamma

    # ----------------------------------------------------------------------------------------- one token at a time

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, D) -> (B, 1, D); conv_state (B, E, K) and ssm_state (B, E, N) are updated in place."""
        self._refuse_two_directions()
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, (B, 1, D), got {tuple(hidden_states.shape)}")
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, 1, E) each
        conv_state.copy_(torch.cat([conv_state[..., 1:], x.transpose(1, 2)], dim=-1))
        bias = [] if self.conv1d.bias is None else [self.conv1d.bias]
        window = conv_state.transpose(1, 2).to(x.dtype)  # (B, K, E)
        u = kernels.causal_conv1d(window, [self.conv1d.weight.squeeze(1)], bias)[0, :, -1:]  # (B, 1, E)
        line = self._line(u, self.x_proj, self.dt_proj, self.A_log, self.D)
        steps = reference.step_size(line.dt, line.dt_bias, line.dt_weight, softplus=True).transpose(1, 2)  # (B, E, 1)
        update = steps * u.transpose(1, 2) * line.B  # (B, E, N)
        ssm_state.copy_(torch.exp(steps * line.A) * ssm_state + update)
        y = (ssm_state.to(steps.dtype) * line.C).sum(-1)[:, None] + self.D * u  # (B, 1, E)
        return self._out((y * F.silu(z.to(steps.dtype))).to(x.dtype)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of zeros, (B, E, K) and (B, E, N); they have the same size for any max_seqlen."""
        conv, steps = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype),
            steps.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or steps.dtype),
        )

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> States:
        self._refuse_two_directions()
        if self.layer_idx is None:
            raise ValueError("a Mamba that keeps states in inference_params needs a layer_idx, got None")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        if initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]

    def _refuse_two_directions(self) -> None:
        if self.bimamba_type != "none":
            raise NotImplementedError(
                f"a Mamba with bimamba_type {self.bimamba_type!r} needs all tokens at once: "
                "step and inference_params are for 'none'"
            )
