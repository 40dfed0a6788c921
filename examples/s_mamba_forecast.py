"""Forecast the birth rates of 192 countries at once: S-Mamba, with the countries as tokens.

    pip install "flowattn[examples]"
    python examples/s_mamba_forecast.py

statsmodels ships the World Bank's births per woman, 1960 to 2011. From 12 years the model forecasts the next 5. It
learns from the years to 1997 and is tested on those after. Writes out/s_mamba_forecast.png and prints the mean squared
error beside those of two rules that need no training.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from statsmodels.datasets import fertility

from flowattn.models.s_mamba import SMamba

WINDOW, HORIZON = 12, 5  # years
FIRST, LAST_SEEN, LAST = 1960, 1997, 2011
SHOWN = ("Brazil", "China", "Egypt, Arab Rep.", "Germany", "India", "Iran, Islamic Rep.", "Kenya", "Niger")


def load():
    """(countries, births per woman (years, countries)) of the countries without a gap."""
    table = fertility.load_pandas().data.set_index("Country Name")
    table = table[[str(year) for year in range(FIRST, LAST + 1)]].dropna()
    return list(table.index), torch.tensor(table.to_numpy().T, dtype=torch.float32)


def windows(series):
    """Every (past (N, WINDOW, V), future (N, HORIZON, V)) of consecutive years (T, V)."""
    pieces = series.unfold(0, WINDOW + HORIZON, 1).transpose(1, 2)
    return pieces[:, :WINDOW], pieces[:, WINDOW:]


def last_value(past):
    return past[:, -1:].expand(-1, HORIZON, -1)


def straight_on(past, years=2):
    """The mean change of the last years goes on; two are the best number of years in this test."""
    step = (past[:, -1:] - past[:, -1 - years : -years]) / years
    return past[:, -1:] + step * torch.arange(1, HORIZON + 1)[:, None]


def forecast(model, past):
    """The model sees and forecasts differences from the last known year."""
    return past[:, -1:] + model(past - past[:, -1:])


def train_model(past, future, epochs):
    torch.manual_seed(0)
    model = SMamba(WINDOW, HORIZON, d_model=64, d_state=16, d_ff=128, num_layers=2, use_norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(past) // 4))
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(past)).split(4):
            loss = F.mse_loss(forecast(model, past[batch]), future[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"\rS-Mamba: epoch {epoch + 1}/{epochs}, loss {loss.item():.4f}", end="", flush=True)
    print(f", {time.perf_counter() - start:.1f} s")
    return model.eval()


def plot(path, countries, past, future, guess):
    """The last window of the test: what was known, what came, what was forecast."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 5), layout="constrained", sharex=True)
    end = LAST - HORIZON
    known, ahead = range(end - WINDOW + 1, end + 1), range(end + 1, LAST + 1)
    for name, axis in zip(SHOWN, axes.flat):
        column = countries.index(name)
        axis.plot(known, past[:, column], color="0.4")
        axis.plot(ahead, future[:, column], color="0.4", linestyle=":", label="what came")
        axis.plot(ahead, guess[:, column], color="C3", label="forecast")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.supylabel("births per woman")
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/s_mamba_forecast.png"))
    arguments = parser.parse_args()
    countries, series = load()
    seen = LAST_SEEN - FIRST + 1
    past, future = windows(series[seen - WINDOW :])
    model = train_model(*windows(series[:seen]), arguments.epochs)
    with torch.no_grad():
        guess = forecast(model, past)
    print(f"mean squared error of {len(past)} forecasts of {HORIZON} years for {len(countries)} countries")
    for name, result in (("S-Mamba", guess), ("straight on", straight_on(past)), ("last value", last_value(past))):
        print(f"  {name:<12} {F.mse_loss(result, future).item():.4f}")
    plot(arguments.out, countries, past[-1], future[-1], guess[-1])
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
