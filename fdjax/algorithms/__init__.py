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
    fedavg_kd,
    fedbe,
    fedcad,
    feddf,
    feddistill,
    feddistill_plus,
    feddkc,
    fedftg,
    fedgems,
    fedgen,
    fedgh,
    fedgkd,
    fedgkt,
    fedkd,
    fedlsd,
    fedma,
    fedmd,
    fedmlb,
    fedntd,
    fedopt,
    fedproto,
    fedprox,
    fedssd,
    fedtgp,
    fedzkt,
    fml,
    group_distillation,
    group_distillation_proxy,
    mhat,
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
                fedntd,
                fedlsd,
                fedavg_kd,
                fedmlb,
                fedcad,
                fedssd,
                feddistill_plus,
                feddistill,
                cfd,
                feddf,
                fedbe,
                fedaux,
                fedgems,
                fedgen,
                fedftg,
                fedzkt,
                fedma,
                fedgkt,
                feddkc,
                fd,
                faug,
                fedmd,
                cronus,
                dsfl,
                mhat,
                fedad,
                fml,
                fedkd,
                fedproto,
                fedtgp,
                fedgh,
                group_distillation,
                group_distillation_proxy,
            )
        ),
        *fedgkd.METHODS,
        *baselines.METHODS,
    )
}

SHIPPED = MappingProxyType(dict(ALGORITHMS))  # as they are here: what is put into ALGORITHMS later is somebody's own
