"""The published package's names over this package, so that a script written against it runs unchanged.

    sed -i 's/dropbp\\./dropbp_kernels.compat./' train.py

Same classes, methods, defaults, seeds and random numbers as github.com/WooSunghyeon/dropbp (arXiv 2402.17812), so the
same losses. What is printed carries the same numbers in other words. This is for reproducing earlier runs; these
properties of the published code stay:

- a branch is detached after its forward, so its graph is built and then freed: little memory and no norm is saved;
- measuring sensitivities sets the seed 526 in Python, NumPy and torch, and loses gradients accumulated before;
- plans come from NumPy's global generator, gates draw from Python's, and no checkpoint holds either;
- `detact_non_grad` is True when no gate let a gradient through in its last call, or none was ever called.

Errors are ours: no gates, sensitivities that are not finite or all zero, and rates beyond the cap of 0.9 raise.

Moving to the package proper, which drops before the forward and really saves the work:

    x = self.dropbp_mlp(self.mlp(self.norm(x))) + x
        becomes   x = self.gate_mlp.residual_add(x, lambda x: self.mlp(self.norm(x)))
    handler.set_dropped_layers()
        becomes   handler.step()
    handler.sensitivity_based_drop_bp(backprop, 0.75)
        becomes   handler.calibrate(loss)  # a function that returns the loss, without a backward
    if not handler.detact_non_grad(): loss.backward()
        becomes   loss.backward()
"""
