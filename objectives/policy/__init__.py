"""The policy-gradient family: how a policy learns from rewards of what it sampled.

Four small axes (`ratios`: importance ratios and their denominators; `links`: what is maximised of a ratio and an
advantage; `kl`: estimates of the divergence and their gradients; `esscher.objectives.advantages`), the losses that
join them (`losses`), and the named methods.
"""
