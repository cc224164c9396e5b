"""What routers choose: MoE layers, recorded routes, their statistics. Imports sources."""
