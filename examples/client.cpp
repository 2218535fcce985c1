// Inspect one frame from C++17 with nothing but sockets: HTTP and Triton's binary extension.
//
//     g++ -std=c++17 -O2 client.cpp -o client
//     ./client HOST PORT CATEGORY RGB.raw XYZ.raw HEIGHT WIDTH [THRESHOLD]
//
// RGB.raw holds HEIGHT x WIDTH x 3 bytes, XYZ.raw as many little-endian floats in metres, NaN or (0, 0, 0) at
// holes. A line's program has both in memory. Prints one line of JSON; a refused frame is a sentence and exit
// code 1.
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace {

std::string read_file(char const* path, std::size_t expected) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() != expected)
        throw std::runtime_error(std::string(path) + " holds " + std::to_string(bytes.size()) +
                                 " bytes, expected " + std::to_string(expected));
    return bytes;
}

class Connection {
public:
    Connection(char const* host, char const* port) {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM;
        addrinfo* found = nullptr;
        if (getaddrinfo(host, port, &hints, &found) != 0)
            throw std::runtime_error("unknown host");
        for (addrinfo const* each = found; each && descriptor_ < 0; each = each->ai_next) {
            descriptor_ = socket(each->ai_family, each->ai_socktype, each->ai_protocol);
            if (descriptor_ >= 0 && connect(descriptor_, each->ai_addr, each->ai_addrlen) != 0) {
                close(descriptor_);
                descriptor_ = -1;
            }
        }
        freeaddrinfo(found);
        if (descriptor_ < 0)
            throw std::runtime_error(std::string("nothing answers at ") + host + ":" + port);
    }
    Connection(Connection const&) = delete;
    Connection& operator=(Connection const&) = delete;
    ~Connection() { close(descriptor_); }

    void send_all(std::string_view bytes) const {
        while (!bytes.empty()) {
            ssize_t const sent = send(descriptor_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (sent <= 0)
                throw std::runtime_error("the server closed the connection");
            bytes.remove_prefix(static_cast<std::size_t>(sent));
        }
    }

    std::string receive_all() const {
        std::string answer(1 << 16, '\0');
        std::size_t length = 0;
        for (;;) {
            ssize_t const got = recv(descriptor_, &answer[length], answer.size() - length, 0);
            if (got <= 0)
                break;
            length += static_cast<std::size_t>(got);
            if (length == answer.size())
                answer.resize(2 * length);
        }
        answer.resize(length);
        return answer;
    }

private:
    int descriptor_ = -1;
};

// The number behind a key, searched for from `from` on.
std::size_t number_after(std::string const& text, std::string const& key, std::size_t from = 0) {
    std::size_t const at = text.find(key, from);
    if (at == std::string::npos)
        throw std::runtime_error("the answer lacks " + key);
    return std::stoul(text.substr(at + key.size()));
}

// The raw bytes of an output: they follow the JSON in the order in which it names the outputs.
std::string_view output(std::string const& json, std::string_view raw, std::string const& name) {
    std::size_t offset = 0;
    for (std::size_t at = json.find("{\"name\":\""); at != std::string::npos;
         at = json.find("{\"name\":\"", at + 1)) {
        std::size_t const size = number_after(json, "\"binary_data_size\":", at);
        if (json.compare(at + 9, name.size() + 1, name + "\"") == 0)
            return raw.substr(offset, size);
        offset += size;
    }
    throw std::runtime_error("the answer lacks " + name);
}

int inspect(int count, char** words) {
    std::string const category = words[3];
    std::size_t const height = std::stoul(words[6]), width = std::stoul(words[7]);
    std::string const rgb = read_file(words[4], height * width * 3);
    std::string const xyz = read_file(words[5], height * width * 3 * sizeof(float));

    std::string const shape = "\"shape\":[" + std::to_string(height) + "," + std::to_string(width) + ",3],";
    auto const binary = [](std::size_t size) {
        return "\"parameters\":{\"binary_data_size\":" + std::to_string(size) + "}}";
    };
    std::string const limit = count > 8 ? std::string("\"threshold\":\"") + words[8] + "\"" : std::string();
    std::string outputs;
    for (char const* name : {"score", "verdict", "defects"})
        outputs += std::string(outputs.empty() ? "" : ",") + "{\"name\":\"" + name +
                   "\",\"parameters\":{\"binary_data\":true}}";
    std::string const head = "{\"parameters\":{" + limit + "},\"outputs\":[" + outputs + "],\"inputs\":[" +
                             "{\"name\":\"rgb\",\"datatype\":\"UINT8\"," + shape + binary(rgb.size()) +
                             ",{\"name\":\"xyz\",\"datatype\":\"FP32\"," + shape + binary(xyz.size()) + "]}";
    std::string const http = "POST /v2/models/" + category + "/infer HTTP/1.1\r\nHost: " + words[1] + ":" +
                             words[2] + "\r\nConnection: close\r\nContent-Type: application/octet-stream" +
                             "\r\nInference-Header-Content-Length: " + std::to_string(head.size()) +
                             "\r\nContent-Length: " + std::to_string(head.size() + rgb.size() + xyz.size()) +
                             "\r\n\r\n";

    Connection const server(words[1], words[2]);
    for (std::string const* part : {&http, &head, &rgb, &xyz})
        server.send_all(*part);
    std::string const answer = server.receive_all();

    std::size_t const body = answer.find("\r\n\r\n");
    if (body == std::string::npos)
        throw std::runtime_error("the server closed the connection");
    std::string const headers = answer.substr(0, body + 2);
    if (headers.compare(9, 3, "200") != 0)
        throw std::runtime_error("HTTP " + headers.substr(9, 3) + ": " + answer.substr(body + 4));
    std::size_t const json_size = number_after(headers, "\r\nInference-Header-Content-Length: ");
    std::string const json = answer.substr(body + 4, json_size);
    std::string_view const raw = std::string_view(answer).substr(body + 4 + json_size);

    float score = 0;
    std::memcpy(&score, output(json, raw, "score").data(), sizeof score);
    std::int32_t verdict = 0;
    std::memcpy(&verdict, output(json, raw, "verdict").data(), sizeof verdict);
    std::string_view const defects = output(json, raw, "defects").substr(4); // behind its length
    char const* const names[] = {"good", "review", "defect"};
    if (verdict < 0 || verdict > 2)
        throw std::runtime_error("a verdict that this client does not know");
    std::printf("{\"score\": %.9g, \"verdict\": \"%s\", \"defects\": %.*s}\n", static_cast<double>(score),
                names[verdict], static_cast<int>(defects.size()), defects.data());
    return 0;
}

} // namespace

int main(int count, char** words) {
    if (count < 8) {
        std::fprintf(stderr, "client HOST PORT CATEGORY RGB.raw XYZ.raw HEIGHT WIDTH [THRESHOLD]\n");
        return 2;
    }
    try {
        return inspect(count, words);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
