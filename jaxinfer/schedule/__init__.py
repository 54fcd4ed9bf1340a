"""Planning by resource demand: what work asks of the machine, counted from the model's shapes."""

from jaxinfer.schedule.demand import Demand, DemandModel, Span

__all__ = ["Demand", "DemandModel", "Span"]
