// What a fused pass of one rank reads from memory: a model of L2 under the units of csrc/schedule, in their order. Each
// cluster takes unit after unit and asks for its operands step by step; L2 is one list of the blocks last asked for or
// written. What is written takes room, and is never found when it is read: that is much later. Steps and epilogues take
// what traces say, with some jitter.
//
// usage: model_l2 fwd|bwd HIDDEN INTER EXPERTS ROWS CLAIMS_AHEAD CAPACITY_MB
//   ROWS: of an expert, on average. CLAIMS_AHEAD: units that a cluster holds beside the one in work; 0: the next unit
//   is claimed as the kernels do it, at claim_step. Prints GB "read" and "least", where each block is read once.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <queue>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fused_case.hpp"

using namespace megamoe;
using walk::Product;

namespace {

constexpr int kClusters = 66;
constexpr double kStep = 0.7, kWgradStep = 0.77;  // us, of 64 along the reduction
constexpr double kJitter = 0.012;                 // of a unit's time
constexpr int kBlock = 8192;                      // bytes of 64 x 64 bf16

struct Work {
    int product, expert, steps;
    Unit unit;
};

class Cache {
public:
    explicit Cache(size_t blocks) : capacity_(blocks) {}
    // Whether the block was there; it is now.
    bool touch(uint64_t key) {
        const auto found = at_.find(key);
        if (found != at_.end()) {
            order_.splice(order_.begin(), order_, found->second);
            return true;
        }
        order_.push_front(key);
        at_[key] = order_.begin();
        if (order_.size() > capacity_) {
            at_.erase(order_.back());
            order_.pop_back();
        }
        return false;
    }

private:
    size_t capacity_;
    std::list<uint64_t> order_;
    std::unordered_map<uint64_t, std::list<uint64_t>::iterator> at_;
};

struct Shape {
    bool backward;
    int hidden, inter, experts, rows;
};

// Steps of the reduction.
int steps_of(Gemm gemm, const Shape& shape, int rows) {
    if (is_wgrad(gemm)) return wgrad_blocks(rows);
    const int extent = gemm == Gemm::kFc2 ? shape.inter : gemm == Gemm::kDgrad1 ? 2 * shape.inter : shape.hidden;
    return extent / kBlockK;
}

struct Epilogue {
    double us;
    int written, read;  // blocks of a cluster's two tiles
};

Epilogue epilogue_of(Gemm gemm) {
    switch (gemm) {
        case Gemm::kFc1: return {3.6, 24, 0};     // h, a
        case Gemm::kDgrad2: return {13, 48, 32};  // dh, a; h
        case Gemm::kWgrad: return {4.1, 32, 32};  // fp32
        default: return {1.5, 16, 0};
    }
}

class Model {
public:
    Model(const Shape& shape, int ahead, double megabytes)
        : shape_(shape), ahead_(ahead), cache_(static_cast<size_t>(megabytes * 1e6 / kBlock)) {
        for (int e = 0; e < shape.experts; ++e) {
            rows_.push_back(static_cast<int>(shape.rows + std::sqrt(shape.rows) * normal_(random_)));
        }
        const Order order = shape.backward ? backward_order(shape.experts, shape.rows, shape.inter, kClusters)
                                           : forward_order(shape.experts);
        for (int p = 0; p < order.products; ++p) {
            const Pass pass = shape.backward ? Pass::kBackward : Pass::kForward;
            const ProductShape found = product_shape(pass, p, shape.inter, shape.hidden);
            products_.push_back({found.gemm, found.m_extent, found.n_extent, 1, 1});  // added to, wanted
        }
        for (int i = 0; i < num_segments(order); ++i) {
            const Segment segment = segment_at(order, i);
            if (segment.expert >= 0) list(segment);
        }
        const int64_t slots = int64_t{shape.experts} * shape.rows * shape.hidden * 2 / kBlock;  // of the combine
        read_ = streamed_ = static_cast<long>(slots);
    }

    void run() {
        std::priority_queue<Event, std::vector<Event>, std::greater<>> events;
        std::vector<Cluster> clusters(kClusters);
        for (int depth = 0; depth <= ahead_; ++depth) {
            for (Cluster& cluster : clusters) claim(cluster);
        }
        for (int c = 0; c < kClusters; ++c) events.push({0.01 * c, c});  // one after the other
        while (!events.empty()) {
            const auto [time, c] = events.top();
            events.pop();
            const double took = advance(clusters[c]);
            if (took > 0) events.push({time + took, c});
        }
    }

    double read() const { return 1e-9 * kBlock * static_cast<double>(read_); }
    double least() const { return 1e-9 * kBlock * static_cast<double>(seen_.size() + streamed_); }

private:
    using Event = std::pair<double, int>;
    struct Cluster {
        std::deque<int> claimed;
        int work = -1, step = 0;
        double pace = 1;
    };

    void list(const Segment& segment) {
        const int rows = rows_[segment.expert];
        const Product& product = products_[segment.product];
        for (int i = 0; i < units_of(product, true, rows); ++i) {
            works_.push_back({segment.product, segment.expert, steps_of(product.gemm, shape_, rows),
                              unit_of_product(product, rows, i)});
        }
    }

    void claim(Cluster& cluster) {
        if (next_ < works_.size()) cluster.claimed.push_back(static_cast<int>(next_++));
    }

    // One step of a cluster's unit, or its end; how long it takes. 0: no more work.
    double advance(Cluster& cluster) {
        if (cluster.work < 0) {
            if (cluster.claimed.empty()) return 0;
            cluster.work = cluster.claimed.front();
            cluster.claimed.pop_front();
            cluster.step = 0;
            cluster.pace = 1 + kJitter * normal_(random_);
            if (ahead_ > 0) claim(cluster);
        }
        const Work& work = works_[cluster.work];
        const Gemm gemm = products_[work.product].gemm;
        if (ahead_ == 0 && cluster.step == claim_step(work.steps)) claim(cluster);
        if (cluster.step < work.steps) {
            load(work, cluster.step++);
            const bool half = work.unit.n_pair && warpgroups_of(rows_[work.expert], work.unit.m_tile) == 1;
            return (is_wgrad(gemm) ? kWgradStep : half ? 0.62 * kStep : kStep) * cluster.pace;
        }
        const Epilogue epilogue = epilogue_of(gemm);
        for (int i = 0; i < epilogue.written; ++i) cache_.touch(kFresh + fresh_++);
        read_ += epilogue.read;
        streamed_ += epilogue.read;
        cluster.work = -1;
        return epilogue.us * cluster.pace;
    }

    // Both tiles of the unit: blocks of rows (or, of a wgrad, of columns of the left operand), and of columns.
    void load(const Work& work, int step) {
        for (int cta = 0; cta < (work.unit.n_pair ? 1 : kClusterSize); ++cta) {
            for (int i = 0; i < 2; ++i) ask(2 * work.product, work, 2 * m_tile_of(work.unit, cta) + i, step);
        }
        for (int cta = 0; cta < (work.unit.n_pair ? kClusterSize : 1); ++cta) {
            for (int i = 0; i < 4; ++i) ask(2 * work.product + 1, work, 4 * n_tile_of(work.unit, cta) + i, step);
        }
    }

    void ask(int operand, const Work& work, int tile, int step) {
        const uint64_t key = ((uint64_t(operand) * kMaxExperts + work.expert) << 32) + (uint64_t(tile) << 16) + step;
        seen_.insert(key);
        if (!cache_.touch(key)) ++read_;
    }

    static constexpr uint64_t kFresh = uint64_t{1} << 60;  // keys of what is written
    const Shape shape_;
    const int ahead_;
    Cache cache_;
    std::mt19937 random_{5};
    std::normal_distribution<double> normal_;
    std::vector<int> rows_;
    std::vector<Product> products_;
    std::vector<Work> works_;
    std::unordered_set<uint64_t> seen_;
    size_t next_ = 0;
    uint64_t fresh_ = 0;
    long read_ = 0, streamed_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 8 || (std::strcmp(argv[1], "fwd") && std::strcmp(argv[1], "bwd"))) return 2;
    const Shape shape{!std::strcmp(argv[1], "bwd"), std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]),
                      std::atoi(argv[5])};
    Model model(shape, std::atoi(argv[6]), std::atof(argv[7]));
    model.run();
    std::printf("read %.2f least %.2f\n", model.read(), model.least());
}
