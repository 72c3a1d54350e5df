// Calls of kernels, kept to be made again on other memory: what a function did, without the program that
// decided it. A pointer is the distance from one of several bases, which each run gives anew.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dico/cpu.h"

namespace dico {

struct Step {
    virtual ~Step() = default;
    virtual void run(const uintptr_t* bases) const = 0;
};

// A member of a kernel's arguments that lies at a distance from a base.
struct Place {
    size_t offset;  // of the member, a pointer that holds the distance
    size_t base;
};

template <class Args>
class KernelStep : public Step {
  public:
    KernelStep(cpu::Kernel<Args> kernel, Dtype dtype, int threads, const Args& args, std::vector<Place> places)
        : kernel_(kernel), dtype_(dtype), threads_(threads), args_(args), places_(std::move(places)) {}

    void run(const uintptr_t* bases) const override {
        Args args = args_;
        for (const Place& place : places_) {
            char* const member = reinterpret_cast<char*>(&args) + place.offset;
            uintptr_t pointer;
            std::memcpy(&pointer, member, sizeof pointer);
            pointer += bases[place.base];
            std::memcpy(member, &pointer, sizeof pointer);
        }
        kernel_(dtype_, args, threads_);
    }

  private:
    cpu::Kernel<Args> kernel_;  // of the instruction set that was in use: packed weights have its layout
    Dtype dtype_;
    int threads_;
    Args args_;
    std::vector<Place> places_;
};

class Recording {
  public:
    explicit Recording(size_t bases) : bases_(bases) {}

    void add(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }
    size_t bases() const { return bases_; }
    size_t size() const { return steps_.size(); }

    void run(const std::vector<uintptr_t>& bases) const {
        if (bases.size() != bases_)
            throw std::invalid_argument(std::to_string(bases.size()) + " bases: expected " +
                                        std::to_string(bases_));
        for (const auto& step : steps_) step->run(bases.data());
    }

  private:
    size_t bases_;
    std::vector<std::unique_ptr<Step>> steps_;
};

}  // namespace dico
