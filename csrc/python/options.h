// The options of a call (rnnkern/options.py), from Python.
#pragma once

#include "python/operands.h"
#include "scan.h"

namespace rnnkern {

// (states of a reset: h, c or None; seed, number of the layer, recurrent_dropout, zoneout, draws;
// the gains of layer normalisation, a list without elements if there is none).
struct CallOptions {
  py::object reset_h = py::none(), reset_c = py::none();
  Noise noise;
  py::sequence gains{py::object()};  // null or empty: the layer is not normalised

  static CallOptions of(py::handle given) {
    CallOptions made;
    if (given.is_none()) return made;
    const auto t = py::cast<py::tuple>(given);
    if (t.size() != 8) throw Refused("options are 8 values, got " + std::to_string(t.size()));
    made.reset_h = t[0];
    made.reset_c = t[1];
    made.noise = {uint64_t(t[2].cast<int64_t>()), t[3].cast<int>(), t[4].cast<double>(),
                  t[5].cast<double>(), t[6].cast<bool>()};
    made.gains = t[7].cast<py::sequence>();
    return made;
  }

  bool is_default() const {
    return reset_h.is_none() && reset_c.is_none() && noise.recurrent_dropout <= 0 &&
           noise.zoneout <= 0 && !normalises();
  }
  bool normalises() const { return gain_count() > 0; }
  size_t gain_count() const { return gains.ptr() ? gains.size() : 0; }

  // Checks the options against the operands of a pass, and puts them into it.
  template <typename T, typename Scan>
  void give(Operands<T>& o, Scan* scan) const {
    if (is_default()) return;
    for (const double p : {noise.recurrent_dropout, noise.zoneout}) {
      if (!(p >= 0 && p < 1)) throw Refused("a probability is outside [0, 1)");
    }
    o.expect_cpu("options of a call");
    scan->reset_h = o.template state<const T>(reset_h, "h of reset_to", o.sizes.O);
    scan->reset_c = o.template state<const T>(reset_c, "c of reset_to", o.layer().cell_width());
    scan->noise = noise;
    if (!normalises()) return;
    o.sizes.normalised = true;
    read_gains(o, scan->weights);
  }

 private:
  template <typename T>
  void read_gains(const Operands<T>& o, Weights<T>* weights) const {
    const auto wanted = size_t(o.sizes.D * gains_of(o.layer()));
    if (gains.size() != wanted) {
      throw Refused("expected " + std::to_string(wanted) + " gains, got " +
                    std::to_string(gains.size()));
    }
    size_t next = 0;
    for (int d = 0; d < o.sizes.D; ++d) {
      for_gains(o.layer(), &weights[d].gains, [&](const char* name, const T** to, int64_t size) {
        const py::object gain = gains[next++];
        *to = o.vector(gain, name, size);
      });
    }
  }
};

}  // namespace rnnkern
