"""Networks for time courses and functions, and networks that decide how long to compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Problem, SquaredError
from tests.zoo.handwritten_case import written


class TimeCourseNetwork(nn.Module):
    """Convolutions over time shorten the courses; a bidirectional LSTM reads them; attention pools its states."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(FEATURES, 8, 4, 2, 1), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU())
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True)
        self.score, self.head = nn.Linear(10, 1, bias=False), nn.Linear(10, OUTPUT)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.conv(x).transpose(1, 2))
        weight = torch.softmax(self.score(torch.tanh(states)), dim=1)
        return self.head((weight * states).sum(1))


@written("Convolutions and LSTM for time courses", loop=False)
def convolutions_and_lstm() -> Problem:
    """Regions × time points of resting-state recordings, per person."""
    return Problem(TimeCourseNetwork(), torch.randn(SAMPLES, FEATURES, 23))


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions with weight norm; the padding in front is cut off behind."""

    def __init__(self, inner: int, outer: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(inner, outer, 3, padding=self.cut, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outer, outer, 3, padding=self.cut, dilation=dilation))
        self.skip = nn.Conv1d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x)[..., : -self.cut].contiguous())
        h = F.relu(self.conv2(h)[..., : -self.cut].contiguous())
        return F.relu(h + self.skip(x))


@written("TCN with weight norm")
def temporal_convolutions() -> Problem:
    """TCN with weight norm."""
    body = (TemporalBlock(3, 4, 1), TemporalBlock(4, 5, 2))
    model = nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, OUTPUT))
    return Problem(model, torch.randn(SAMPLES, 3, 17))


class SpectralConv1d(nn.Module):
    """A product with complex weights per mode of the Fourier transform."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        dtype = torch.complex128 if torch.get_default_dtype() == torch.float64 else torch.complex64
        self.weight = nn.Parameter(torch.rand(width, width, modes, dtype=dtype) / width**2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        mixed = torch.zeros_like(spectrum)
        mixed[..., : self.modes] = torch.einsum("bix,iox->box", spectrum[..., : self.modes], self.weight)
        return torch.fft.irfft(mixed, n=x.shape[-1])


class FourierOperator(nn.Module):
    """FNO: lift, Fourier layers beside pointwise convolutions, project."""

    def __init__(self, width: int = 5, modes: int = 4) -> None:
        super().__init__()
        self.lift = nn.Linear(2, width)
        self.spectral = nn.ModuleList(SpectralConv1d(width, modes) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))
        self.project = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, 1))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1)
        h = self.lift(torch.stack([x, grid], dim=-1)).transpose(1, 2)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            h = F.gelu(spectral(h) + pointwise(h))
        return self.project(h.transpose(1, 2))[..., 0]


@written("Fourier neural operator (complex weights)")
def fourier_neural_operator() -> Problem:
    return Problem(FourierOperator(), torch.randn(SAMPLES, 16))


class LongConvolution(nn.Module):
    """A kernel as long as the course, from damped complex oscillations, applied by Fourier transform (S4D)."""

    def __init__(self, width: int, state: int = 4) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(-torch.rand(width))
        self.log_real = nn.Parameter(0.5 * torch.ones(width, state).log())
        self.imaginary = nn.Parameter(torch.arange(state).repeat(width, 1).to(self.log_dt.dtype))
        self.C, self.D = nn.Parameter(torch.randn(width, state, 2)), nn.Parameter(torch.randn(width))

    def kernel(self, length: int) -> Tensor:
        step, pole = self.log_dt.exp()[:, None], torch.complex(-self.log_real.exp(), self.imaginary)
        times = torch.arange(length, device=step.device, dtype=step.dtype)
        gain = torch.view_as_complex(self.C) * (torch.exp(pole * step) - 1) / pole
        return 2 * torch.einsum("hn,hnt->ht", gain, torch.exp((pole * step)[..., None] * times)).real

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        spectrum = torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(self.kernel(n), n=2 * n)
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n] + x * self.D[:, None]


class StateSpace(nn.Module):
    """Long convolutions with pointwise mixing and norms."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(FEATURES, width), nn.Linear(width, OUTPUT)
        self.long, self.mix = LongConvolution(width), nn.Conv1d(width, 2 * width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x).transpose(1, 2)
        h = self.norm((h + F.glu(self.mix(F.gelu(self.long(h))), dim=1)).transpose(1, 2))
        return self.head(h.mean(1))


@written("State space model (S4D)")
def state_space_model() -> Problem:
    return Problem(StateSpace(), torch.randn(SAMPLES, 8, FEATURES))


class AdaptiveComputation(nn.Module):
    """A universal transformer's way to halt: each sample goes on until its halting probabilities add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step = nn.Linear(FEATURES, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)
        self.halt, self.head = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: Tensor, most: int = 6) -> tuple[Tensor, Tensor]:
        inputs = torch.tanh(self.stem(x))
        state, total = torch.zeros_like(inputs), torch.zeros_like(inputs)
        left, ponder = inputs.new_ones(len(x)), inputs.new_zeros(len(x))
        for number in range(most):
            state = self.step(inputs, state)
            share = torch.sigmoid(3 * self.halt(state)[:, 0])
            running = left > 0.05
            share = torch.where(torch.tensor(number == most - 1), left, torch.minimum(share, left)) * running
            total = total + share[:, None] * state
            ponder = ponder + left * running
            left = left - share
            if not (left > 0.05).any():
                break
        return self.head(total), ponder


class Pondered(SquaredError):
    """Squared error and the price of time."""

    def __call__(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return super().__call__(output[0]) + 0.01 * output[1]


@written("Adaptive computation time")
def adaptive_computation_time() -> Problem:
    return Problem(AdaptiveComputation(), 2 * torch.randn(SAMPLES, FEATURES), Pondered())


class EarlyExit(nn.Module):
    """Samples that are sure leave; only the others go on to the next layer."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        widths = [FEATURES] + [HIDDEN] * stages
        self.stages = nn.ModuleList(nn.Linear(widths[n], widths[n + 1]) for n in range(stages))
        self.exits = nn.ModuleList(nn.Linear(HIDDEN, OUTPUT) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        result = x.new_zeros(len(x), OUTPUT)
        here = torch.arange(len(x), device=x.device)
        for number, (stage, leave) in enumerate(zip(self.stages, self.exits, strict=True)):
            x = torch.relu(stage(x))
            logits = leave(x)
            sure = logits.softmax(-1).amax(-1) > 0.45
            if number == len(self.stages) - 1:
                sure = torch.ones_like(sure)
            result = result.index_copy(0, here[sure], logits[sure])
            x, here = x[~sure], here[~sure]
            if not len(here):
                break
        return result


@written("Early exit per sample")
def early_exit_per_sample() -> Problem:
    return Problem(EarlyExit(), 2 * torch.randn(SAMPLES, FEATURES))


class SelectiveScan(nn.Module):
    """A Mamba-like block in plain PyTorch: depthwise causal convolution, input-dependent steps, a loop over time."""

    def __init__(self, width: int = 6, inner: int = 8, state: int = 4) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.dt = nn.Linear(inner, 3 + 2 * state, bias=False), nn.Linear(3, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1).repeat(inner, 1)).to(self.dt.weight.dtype))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.into(x).chunk(2, dim=-1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.select(h).split([3, self.A_log.shape[1], self.A_log.shape[1]], dim=-1)
        step = F.softplus(self.dt(step))
        decay = torch.exp(step[..., None] * -torch.exp(self.A_log))
        drive = step[..., None] * b[:, :, None] * h[..., None]
        state, out = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            out.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(out, dim=1) + h * self.D) * F.silu(gate))


@written("Selective scan, by hand")
def selective_scan_network() -> Problem:
    """Mamba-like blocks with a norm between them."""
    layers = [nn.Linear(FEATURES, 6), SelectiveScan(), nn.LayerNorm(6), SelectiveScan(), nn.Linear(6, OUTPUT)]
    return Problem(nn.Sequential(*layers), torch.randn(SAMPLES, TIME, FEATURES))
