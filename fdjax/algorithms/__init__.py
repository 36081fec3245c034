"""The methods, one paper a file, each with a record `METHOD` that enrols it in programs, sweeps and tests."""

from types import MappingProxyType

from fdjax.algorithms import (
    baselines,
    cfd,
    cronus,
    dsfl,
    faug,
    fd,
    fedad,
    fedaux,
    fedavg,
    feddf,
    feddistill,
    fedgems,
    fedgen,
    fedgkt,
    fedma,
    fedmd,
    fedopt,
    fedprox,
    fedssd,
)
from fdjax.method import Method

ALGORITHMS: dict[str, Method] = {
    method.name: method
    for method in (
        *(
            module.METHOD
            for module in (
                fedavg,
                fedopt,
                fedprox,
                fedssd,
                feddistill,
                cfd,
                feddf,
                fedaux,
                fedgems,
                fedgen,
                fedma,
                fedgkt,
                fd,
                faug,
                fedmd,
                cronus,
                dsfl,
                fedad,
            )
        ),
        *baselines.METHODS,
    )
}

SHIPPED = MappingProxyType(dict(ALGORITHMS))  # as they are here: what is put into ALGORITHMS later is somebody's own
