// One step of AdamW over many tensors, on fp32 masters. Per element, g = gradient * factor:
//
//     master = (1 - lr * weight_decay) * master
//     first  = first + (1 - beta1) * (g - first)
//     second = beta2 * second + (1 - beta2) * g * g
//     master = master - lr / (1 - beta1^n) * first / (sqrt(second) / sqrt(1 - beta2^n) + eps)
//     weight = round(master);  ema = ema + (1 - ema_decay) * (master - ema)
//
// factor, n and whether anything is done at all come from memory: prepare() turns them into the four AdamWScalars of a
// tensor, and AdamWUpdate::element() is all the arithmetic per element. Both are compiled for the host and the device.
#pragma once

#include <cmath>
#include <vector>

#include "common.h"

namespace osf {

// weight may be null (the master is the weight), and so may ema and count; elements do not overlap between tensors.
struct AdamWTensor {
    float* master;
    void* weight;
    const void* gradient;
    float* first;
    float* second;
    float* ema;
    float* count;  // updates done so far
    int64_t size;
};

struct AdamWOptions {
    double lr, beta1, beta2, eps, weight_decay, ema_decay;
    double max_norm;              // of all gradients together, after gradient_scale; infinite where nothing is clipped
    double step;                  // the number of this update, for tensors without a count
    const float* gradient_norm;   // of the gradients as they are; may be null
    const float* gradient_scale;  // what the gradients are to be multiplied by; may be null
};

// 16 bytes, for a block to read at once.
struct alignas(16) AdamWScalars {
    float factor;       // of the gradient
    float step_size;    // lr / (1 - beta1^n)
    float root_factor;  // 1 / sqrt(1 - beta2^n)
    float proceeds;     // 0 when the gradients are not finite: nothing is read or written
};

// The part of the options that a whole step shares, as the kernels take it.
struct AdamWStep {
    double lr, log_beta1, log_beta2, step;
    float max_norm;
    const float* gradient_norm;
    const float* gradient_scale;

    explicit AdamWStep(const AdamWOptions& options)
        : lr(options.lr),
          log_beta1(std::log(options.beta1)),
          log_beta2(std::log(options.beta2)),
          step(options.step),
          max_norm(static_cast<float>(options.max_norm)),
          gradient_norm(options.gradient_norm),
          gradient_scale(options.gradient_scale) {}

    // In float64, as 1 - beta2^n would lose half of its digits in float32. Advances the count, if there is one.
    OSF_HD AdamWScalars prepare(float* count) const {
        const float scale = gradient_scale ? *gradient_scale : 1.0f;
        const float norm = scale * (gradient_norm ? *gradient_norm : 0.0f);
        const bool finite = norm - norm == 0.0f && scale - scale == 0.0f;
        const float clip = max_norm / (norm + 1e-6f);
        const double n = count ? static_cast<double>(*count) + 1.0 : step;
        if (count && finite) *count = static_cast<float>(n);
        return {clip < 1.0f ? scale * clip : scale, static_cast<float>(lr / -expm1(n * log_beta1)),
                static_cast<float>(1.0 / sqrt(-expm1(n * log_beta2))), finite ? 1.0f : 0.0f};
    }
};

struct AdamWUpdate {
    float keep, first_share, second_keep, second_share, eps, ema_share;

    explicit AdamWUpdate(const AdamWOptions& options)
        : keep(static_cast<float>(1.0 - options.lr * options.weight_decay)),
          first_share(static_cast<float>(1.0 - options.beta1)),
          second_keep(static_cast<float>(options.beta2)),
          second_share(static_cast<float>(1.0 - options.beta2)),
          eps(static_cast<float>(options.eps)),
          ema_share(static_cast<float>(1.0 - options.ema_decay)) {}

    OSF_HD void element(const AdamWScalars& scalars, float gradient, float& master, float& first, float& second) const {
        const float g = gradient * scalars.factor;
        first += first_share * (g - first);
        second = second_keep * second + second_share * (g * g);
        const float denominator = sqrtf(second) * scalars.root_factor + eps;
        master = keep * master - scalars.step_size * first / denominator;
    }

    OSF_HD float average(float ema, float master) const { return ema + ema_share * (master - ema); }
};

// Calls body(gradient type{}, weight type{}).
template <class Body>
void with_adamw_types(const std::string& gradient_dtype, const std::string& weight_dtype, Body&& body) {
    with_element_type(gradient_dtype, [&](auto gradient) {
        with_element_type(weight_dtype, [&](auto weight) { body(gradient, weight); });
    });
}

// Entry points, one per device. gradient_dtype and weight_dtype hold for all tensors; `scalars` is room on the device
// for as many AdamWScalars as there are tensors.
void adamw_cpu(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, const std::string& gradient_dtype,
               const std::string& weight_dtype, int threads);
void adamw_cuda(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, const std::string& gradient_dtype,
                const std::string& weight_dtype, uintptr_t scalars, uintptr_t stream);

}  // namespace osf
