// What a distance 1 - cosine is multiplied by: s q^gamma, which leaves the range of a float easily.

#pragma once

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "sets.h"

namespace fcn_kernels {

// Weights of one set, divided by 2^exponent: 0 unless they leave 2^-64 to 2^64, else that of the largest. Dividing all
// of a set's weights by one number changes no pick.
class Weights {
  public:
    explicit Weights(const Call& call)
        : call(call), gamma(std::isfinite(*call.gamma) ? *call.gamma : std::numeric_limits<Acc>::quiet_NaN()) {}

    // For rows whose qualities lie within these bounds; whether all weights are in range.
    bool fit(Acc least, Acc greatest) {
        const double low = log2_of(least), high = log2_of(greatest), scale = std::log2(call.distance_scale);
        const auto widest = [&](double log2) { return std::max(std::abs(log2), std::abs(log2 - scale)); };
        plain = !(std::max(widest(low), widest(high)) > LARGEST_EXPONENT);
        exponent = plain ? 0 : int(std::clamp(std::floor(std::max(low, high)), -1e6, 1e6));
        // noise has a scale of its own: beside it small weights are left small
        if (call.noise || call.seed) exponent = std::max(exponent, 0);
        return plain;
    }

    Acc at(Acc quality) const { return plain ? ordinary(quality) : normal(std::exp2(log2_of(quality) - exponent)); }

    // The weight itself, at the most 2^100, for the gradient; without a number for gamma there is none.
    Acc whole(Acc quality) const {
        if (std::isnan(gamma)) return 0;
        return plain ? ordinary(quality) : Acc(std::exp2(log2_of(quality) - std::max(exponent - 100, 0)));
    }

    // A distance in units of 2^exponent as it is reported: within the type's range, and 0 for NaN.
    Acc reported(Acc distance) const {
        const Acc whole = plain ? distance : std::scalbn(normal(distance), exponent);
        return std::isnan(whole) ? 0 : std::min(whole, std::numeric_limits<Acc>::max());
    }

    // A distance in units of 2^exponent.
    Acc in_units(Acc distance) const { return plain ? distance : std::scalbn(distance, -exponent); }

    bool are_numbers() const { return !std::isnan(gamma); }
    Acc gamma_or_zero() const { return std::isnan(gamma) ? 0 : gamma; }
    Acc shifted(Acc difference) const { return plain ? difference : std::scalbn(difference, exponent); }
    Acc noise_scale() const { return Acc(std::exp2(-std::max(exponent, 0))); }  // where there is noise, it is not below

  private:
    static constexpr double LARGEST_EXPONENT = 64;
    const Call& call;
    const Acc gamma;
    bool plain = true;
    int exponent = 0;

    Acc ordinary(Acc quality) const {
        return std::isnan(gamma) ? gamma : std::pow(quality, gamma) * Acc(call.distance_scale);  // pow(1, NaN) is 1
    }
    static Acc normal(double value) { return value < std::numeric_limits<Acc>::min() ? 0 : Acc(value); }  // or 0
    double log2_of(Acc quality) const {
        return double(gamma) * std::log2(double(quality)) + std::log2(call.distance_scale);
    }
};

// The bounds of some rows' qualities.
struct Range {
    Acc least = INFINITE, greatest = 0;
    void add(Acc quality) { least = std::min(least, quality), greatest = std::max(greatest, quality); }
};

}  // namespace fcn_kernels
