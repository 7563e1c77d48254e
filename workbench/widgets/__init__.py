"""Controls around figures. Each widget is stored in a notebook together with a still picture, see `still`."""

from workbench.widgets.still import register as _register

_register()
