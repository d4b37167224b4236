"""Look inside the reference while it runs: wrap functions, hook modules, and undo all of it at the end."""


class Recorder:
    """A dictionary of tensors plus the wraps that fill it. Use as a context manager."""

    def __init__(self):
        self.tensors, self._undo = {}, []

    def keep(self, name, tensor):
        """Stores the first tensor given for a name."""
        if name not in self.tensors:
            self.tensors[name] = tensor.detach().clone().contiguous()

    def wrap(self, owner, attribute, after):
        """Calls `after(result, args, kwargs)` after every call of `owner.attribute`."""
        original = getattr(owner, attribute)

        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            after(result, args, kwargs)
            return result

        setattr(owner, attribute, wrapper)
        self._undo.append(lambda: setattr(owner, attribute, original))

    def hook(self, module, after):
        """The same for a module's forward, which a plain attribute would not reach."""
        handle = module.register_forward_hook(lambda _, args, kwargs, result: after(result, args, kwargs), with_kwargs=True)
        self._undo.append(handle.remove)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self._undo:
            self._undo.pop()()
