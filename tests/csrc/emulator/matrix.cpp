// Matrix instructions: every thread computes its share of D, some time between issue and wait.
#include "state.hpp"

namespace emulator {
namespace {

constexpr int kColumns = 256, kDepth = 16, kWarpRows = 16;

// An operand in shared memory as its descriptor tells: 128-byte swizzle.
class Operand {
public:
    Operand(uint64_t descriptor, bool mn) : mn_(mn) {
        if (descriptor >> 62 != 1) die("a matrix descriptor without the 128-byte swizzle");
        start_ = reinterpret_cast<uint64_t>(cta().shared) + ((descriptor & 0x3fff) << 4);
        leading_ = (descriptor >> 16 & 0x3fff) << 4;
        stride_ = (descriptor >> 32 & 0x3fff) << 4;
    }

    // K-major: rows of `mn`, 64 k in each. MN-major: rows of k, 64 mn in each; the next 64 are `leading` away.
    float at(int mn, int k) const {
        const auto row = static_cast<uint64_t>(mn_ ? k : mn), column = static_cast<uint64_t>(mn_ ? mn : k);
        uint64_t address = start_ + row / 8 * stride_ + row % 8 * 128 + column % 64 * 2;
        if (mn_) address += column / 64 * leading_;
        uint16_t bits;
        std::memcpy(&bits, reinterpret_cast<const void*>(swizzled(address)), 2);
        return __uint_as_float(uint32_t{bits} << 16);
    }

private:
    bool mn_;
    uint64_t start_, leading_, stride_;
};

void perform(const Product& product) {
    const int lane = static_cast<int>(running->place.thread.x % 32);
    const int first = static_cast<int>(running->place.thread.x / 32 % 4) * kWarpRows + lane / 4;
    const Operand a(product.a, product.a_mn), b(product.b, product.b_mn);
    float left[2][kDepth];
    for (int k = 0; k < kDepth; ++k) left[0][k] = a.at(first, k), left[1][k] = a.at(first + 8, k);
    for (int column = 0; column < kColumns / 4; ++column) {
        const int j = column / 2, odd = column % 2, n = 8 * j + lane % 4 * 2 + odd;
        float* d[2] = {product.d + 4 * j + odd, product.d + 4 * j + 2 + odd};
        float sum[2] = {};
        for (int k = 0; k < kDepth; ++k) {
            const float right = b.at(n, k);
            sum[0] += left[0][k] * right, sum[1] += left[1][k] * right;
        }
        for (int i = 0; i < 2; ++i) *d[i] = product.accumulate ? *d[i] + sum[i] : sum[i];
    }
}

void first_done() {
    const Product product = running->products.front();
    running->products.erase(running->products.begin());
    perform(product);
}

}  // namespace

void multiply(float* d, uint64_t a, bool a_mn, uint64_t b, bool b_mn, bool accumulate) {
    running->products.push_back({d, a, b, a_mn, b_mn, accumulate, running->product_group});
}

void commit_products() { ++running->product_group; }

void products_step() {
    if (!running->products.empty() && running->products.front().group < running->product_group) first_done();
}

void wait_products(int pending) {
    yield();
    while (!running->products.empty() && running->products.front().group < running->product_group - pending) {
        first_done();
    }
}

}  // namespace emulator
