// The search's optimiser, in one place for the CPU twin and the CUDA kernel: AdamW as torch.optim.AdamW steps
// it (beta 0.9/0.999, eps 1e-8, weight decay 0.01), under CosineAnnealingLR(T_max=10, eta_min=eta/4).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace deepen {

constexpr float kBeta1 = 0.9f, kBeta2 = 0.999f, kAdamEpsilon = 1e-8f, kWeightDecay = 0.01f;
constexpr int kCosinePeriod = 10;
constexpr int kSearchRowsPerThread = 2;  // a row takes some 100 microseconds
constexpr int kMaxSearchSteps = 64;
// Beside weight decay a step moves a logit by up to 1.82 times the rate: the largest sqrt(sum_i a_i^2 / b_i)
// of 64 steps, a_i and b_i being the moments' weights (Cauchy-Schwarz). The CUDA search takes exp() of it,
// which is infinite from 89 on.
constexpr double kMaxLearningRate = 10;

// What one step needs, computed once on the host in double.
struct AdamStep {
  float keep;             // 1 - eta_t * weight_decay
  float step_size;        // eta_t / (1 - beta1^t)
  float root_correction;  // 1 / sqrt(1 - beta2^t)
};

// `step` counts from 0.
static inline AdamStep adam_step(double learning_rate, int step) {
  const double lowest = learning_rate / 4;
  const double pi = 3.14159265358979323846;
  const double eta = lowest + (learning_rate - lowest) * (1 + std::cos(pi * step / kCosinePeriod)) / 2;
  return {float(1 - eta * double(kWeightDecay)), float(eta / (1 - std::pow(0.9, step + 1))),
          float(1 / std::sqrt(1 - std::pow(0.999, step + 1)))};
}

static inline DEEPEN_HOST_DEVICE void adam_update(float gradient, const AdamStep& step, float* first,
                                                  float* second, float* logit) {
  *first = kBeta1 * *first + (1 - kBeta1) * gradient;
  *second = kBeta2 * *second + (1 - kBeta2) * gradient * gradient;
  *logit =
      *logit * step.keep - step.step_size * *first / (sqrtf(*second) * step.root_correction + kAdamEpsilon);
}

}  // namespace deepen
